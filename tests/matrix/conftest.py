"""Float checkpoints and quantized artefacts, made once a session."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import hf_lowbit
from tests.matrix.models import MODELS, TinyModel, fingerprint


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests that ask for ``method`` or ``tiny`` run for every registered method and every architecture."""
    if "method" in metafunc.fixturenames:
        data_free = [method for method in hf_lowbit.methods().values() if not method.needs_data]
        metafunc.parametrize("method", data_free, ids=lambda method: method.name)
    if "tiny" in metafunc.fixturenames:
        metafunc.parametrize("tiny", MODELS.values(), ids=lambda tiny: tiny.name)


@pytest.fixture(scope="session")
def float_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[TinyModel], Path]:
    """The bfloat16 checkpoint of an architecture."""
    made: dict[str, Path] = {}

    def folder(tiny: TinyModel) -> Path:
        if tiny.name not in made:
            made[tiny.name] = tiny.create(tmp_path_factory.mktemp(tiny.name) / "float")
        return made[tiny.name]

    return folder


@dataclass(frozen=True)
class Artefact:
    """A saved quantized model, and what it was when it was saved."""

    folder: Path
    tensors: dict[str, str]
    output: torch.Tensor
    report: Any


@pytest.fixture(scope="session")
def artefact(
    float_folder: Callable[[TinyModel], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Any, TinyModel], Artefact]:
    """A method's default quantization of an architecture, saved in tiny shards."""
    made: dict[tuple[str, str], Artefact] = {}

    def make(method: Any, tiny: TinyModel) -> Artefact:
        key = (method.name, tiny.name)
        if key not in made:
            model = tiny.load(float_folder(tiny), quantization_config=method.config_class(bits=4))
            folder = tmp_path_factory.mktemp(f"{method.name}-{tiny.name}") / "packed"
            model.save_pretrained(folder, max_shard_size="20KB")
            made[key] = Artefact(folder, fingerprint(model), tiny.run(model), hf_lowbit.report(model))
        return made[key]

    return make
