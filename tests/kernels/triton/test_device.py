"""The package does without Triton until a product asks for it."""

from __future__ import annotations

import subprocess
import sys


def test_importing_the_package_imports_no_triton() -> None:
    code = "import sys, hf_lowbit.kernels; sys.exit(any(n.split('.')[0] == 'triton' for n in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
