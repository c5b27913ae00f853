"""Every public name can be the first thing that a process uses."""

from __future__ import annotations

import subprocess
import sys

import pytest

import hf_lowbit

FIRST_OF_MODULE = {module: name for name, module in sorted(hf_lowbit._LAZY.items(), reverse=True)}


@pytest.mark.parametrize("name", sorted(FIRST_OF_MODULE.values()))
def test_can_be_used_first(name: str) -> None:
    """In a fresh process: what it imports imports libraries whose import registers us, which needs more of us."""
    code = f"import hf_lowbit; hf_lowbit.{name}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
