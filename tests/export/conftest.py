"""Every case exported once, and read once by a process without hf_lowbit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_lowbit.export import Exported, export_model
from tests.export.cases import CASES
from tests.matrix.models import MODELS

READER = Path(__file__).with_name("reader.py")


@dataclass
class Reading:
    """One case: our model, what the export said and wrote, and what plain transformers made of it."""

    model: Any
    exported: Exported
    config: dict[str, Any]
    read: dict[str, Any]


@pytest.fixture(scope="session")
def readings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reading]:
    """Name of a case -> what became of it."""
    place = tmp_path_factory.mktemp("export")
    models, exported, requests = {}, {}, {}
    for name, case in CASES.items():
        models[name] = case.quantize(place / name / "float")
        exported[name] = export_model(models[name], place / name / "out")
        tiny = MODELS[case.model]
        inputs = tiny.inputs(torch.float32)
        requests[name] = {"folder": str(place / name / "out"), "auto": tiny.auto, "inputs": inputs}
    torch.save(requests, place / "requests.pt")
    command = [sys.executable, str(READER), str(place / "requests.pt"), str(place / "results.pt")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results = torch.load(place / "results.pt", weights_only=True)
    configs = {name: json.loads((place / name / "out" / "config.json").read_text()) for name in CASES}
    return {name: Reading(models[name], exported[name], configs[name], results[name]) for name in CASES}
