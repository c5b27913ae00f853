"""The promises for layers whose inputs have stored scales, or scales of their own groups, on every architecture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import hf_lowbit
from hf_lowbit.nn import disconnect_siblings
from tests.matrix.backends import errors_of_layers
from tests.matrix.conftest import Artefact, config_of
from tests.matrix.models import TinyModel, fingerprint

VARIANTS: dict[str, dict[str, Any]] = {
    "static": {"activation_static": True},
    "groups": {"activation_bits": 4, "activation_group_size": 16},
    "asymmetric": {"activation_symmetric": False},
    "static groups": {"activation_static": True, "activation_symmetric": False, "activation_group_size": 16},
}
NAMES = {
    "static": "int 8 bits, static",
    "groups": "int 4 bits, groups of 16",
    "asymmetric": "int 8 bits, asymmetric",
    "static groups": "int 8 bits, asymmetric, groups of 16, static",
}
Make = Callable[[str, TinyModel], Artefact]


@pytest.fixture(scope="session")
def saved(float_folder: Callable[[TinyModel], Path], tmp_path_factory: pytest.TempPathFactory) -> Make:
    """SmoothQuant with such inputs, saved."""
    made: dict[tuple[str, str], Artefact] = {}

    def make(variant: str, tiny: TinyModel) -> Artefact:
        if (variant, tiny.name) not in made:
            values = {"bits": 8, "activation_bits": 8, **VARIANTS[variant]}
            config = replace(config_of(hf_lowbit.methods()["smoothquant"], tiny), **values)
            model = hf_lowbit.quantize(tiny.load(float_folder(tiny)), config)
            folder = tmp_path_factory.mktemp(f"{variant}-{tiny.name}") / "packed"
            model.save_pretrained(folder, max_shard_size="20KB")
            made[variant, tiny.name] = Artefact(folder, fingerprint(model), tiny.run(model), hf_lowbit.report(model))
        return made[variant, tiny.name]

    return make


@pytest.mark.parametrize("variant", VARIANTS)
def test_reloads_bit_equal_with_and_without_siblings(variant: str, tiny: TinyModel, saved: Make) -> None:
    artefact = saved(variant, tiny)
    reloaded = tiny.load(artefact.folder)
    assert fingerprint(reloaded) == artefact.tensors
    assert torch.equal(tiny.run(reloaded), artefact.output)
    disconnect_siblings(reloaded)
    assert torch.equal(tiny.run(reloaded), artefact.output)


@pytest.mark.parametrize("variant", VARIANTS)
def test_integers_multiply_and_are_reported(variant: str, tiny: TinyModel, saved: Make) -> None:
    report = saved(variant, tiny).report
    assert {layer.arithmetic for layer in report.layers} == {"int8"}
    wanted = NAMES[variant]
    others = {layer.name.rpartition(".")[0] for layer in report.layers if layer.activation != wanted}
    text = " ".join(report.warnings)
    assert not others or "does not divide" in text or "dynamic scales" in text
    assert len(others) < len(report.layers) / 4
    assert wanted in (saved(variant, tiny).folder / "README.md").read_text()


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_reference_backend_agrees(variant: str, tiny: TinyModel, saved: Make) -> None:
    native, reference = (tiny.load(saved(variant, tiny).folder, dtype=torch.float32) for _ in range(2))
    for name, error in errors_of_layers(tiny, native, reference).items():
        assert error < 1e-4, name


def test_types_and_bytes(tiny: TinyModel, saved: Make, tmp_path: Path) -> None:
    """Loading in another type changes no stored scale; a reload saves the same again."""
    artefact: Any = saved("static", tiny)
    half = tiny.load(artefact.folder, torch.float16)
    scales = {name: value for name, value in artefact.tensors.items() if name.endswith("_input_scale")}
    assert scales and scales.items() <= fingerprint(half).items()
    assert torch.isfinite(tiny.run(half)).all()
    tiny.load(artefact.folder).save_pretrained(tmp_path / "again")
    assert fingerprint(tiny.load(tmp_path / "again")) == artefact.tensors
