"""One new process reloads every saved artefact and finds the same bits."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import hf_lowbit
from tests.matrix.conftest import is_refused, is_slow
from tests.matrix.models import MODELS

_RELOAD = """
import json, sys
import torch
import hf_lowbit
from tests.matrix.models import MODELS, fingerprint
for line in sys.stdin:
    name, folder, output = json.loads(line)
    model = MODELS[name].load(folder)
    torch.save(MODELS[name].run(model), output)
    print(json.dumps(fingerprint(model)), flush=True)
"""


@pytest.mark.parametrize("slow", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_every_artefact_reloads_in_a_new_process(slow: bool, artefact: Callable[..., Any], tmp_path: Path) -> None:
    methods = hf_lowbit.methods().values()
    every = [(method, tiny) for method in methods for tiny in MODELS.values() if not is_refused(method, tiny)]
    saved = [(tiny, artefact(method, tiny)) for method, tiny in every if is_slow(method, tiny) is slow]
    orders = [json.dumps([tiny.name, str(a.folder), str(tmp_path / f"{i}.pt")]) for i, (tiny, a) in enumerate(saved)]
    result = subprocess.run(
        [sys.executable, "-c", _RELOAD], input="\n".join(orders), capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    found = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert len(found) == len(saved)
    for index, ((tiny, artefact_), tensors) in enumerate(zip(saved, found, strict=True)):
        assert tensors == artefact_.tensors, tiny.name
        assert torch.equal(torch.load(tmp_path / f"{index}.pt"), artefact_.output), tiny.name
