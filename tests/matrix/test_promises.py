"""What every method promises on every architecture."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import hf_lowbit
from hf_lowbit.nn import KINDS, MixerSpec, disconnect_siblings, kind_of, refusal_of
from hf_lowbit.plan import packed_modules
from tests.matrix.backends import errors_of_layers
from tests.matrix.conftest import Artefact, bits_of, quantized
from tests.matrix.models import TinyModel, fingerprint

Make = Callable[[Any, TinyModel], Artefact]


def test_config_round_trips(method: Any) -> None:
    bits = bits_of(method)
    config = method.config_class(bits=bits, modules_to_not_convert=["lm_head"], overrides={"q_proj": {"bits": bits}})
    assert type(config).from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_saves_and_reloads_bit_equal(method: Any, tiny: TinyModel, artefact: Make) -> None:
    saved = artefact(method, tiny)
    assert len(list(saved.folder.glob("*.safetensors"))) > 1, "the shards were meant to be tiny"
    reloaded = tiny.load(saved.folder)
    assert fingerprint(reloaded) == saved.tensors
    assert torch.equal(tiny.run(reloaded), saved.output)


def test_siblings_change_no_bit_and_no_name(method: Any, tiny: TinyModel, artefact: Make) -> None:
    saved = artefact(method, tiny)
    alone = tiny.load(saved.folder)
    disconnect_siblings(alone)
    assert torch.equal(tiny.run(alone), saved.output)
    assert fingerprint(alone) == saved.tensors


def test_the_reference_backend_agrees(method: Any, tiny: TinyModel, artefact: Make) -> None:
    saved = artefact(method, tiny)
    native, reference = (tiny.load(saved.folder, dtype=torch.float32) for _ in range(2))
    twins = packed_modules(reference)
    for name, error in errors_of_layers(tiny, native, reference).items():
        rounds = twins[name].layer_spec.mixer is not None  # within: what lies halfway goes up here and down there
        assert error < (2e-3 if rounds else 1e-4), name


def test_a_reload_saves_the_same_again(method: Any, tiny: TinyModel, artefact: Make, tmp_path: Path) -> None:
    saved = artefact(method, tiny)
    tiny.load(saved.folder).save_pretrained(tmp_path / "again")
    assert fingerprint(tiny.load(tmp_path / "again")) == saved.tensors


def test_nothing_is_left_out_in_silence(method: Any, tiny: TinyModel, artefact: Make) -> None:
    saved = artefact(method, tiny)
    model = tiny.load(saved.folder)
    packed = packed_modules(model)
    assert {layer.name.rpartition(".")[0] for layer in saved.report.layers} == set(packed)
    floats = {name for name, module in model.named_modules() if kind_of(module) or refusal_of(module)} - set(packed)
    assert floats == set(saved.report.skipped)
    assert all(saved.report.skipped.values())


def test_most_weights_are_packed(method: Any, tiny: TinyModel, artefact: Make) -> None:
    """Coverage: everything but heads, embeddings, norms and what model code reads itself."""
    saved = artefact(method, tiny)
    model = tiny.load(saved.folder)
    floats = {n: p for n, p in model.named_parameters() if p.is_floating_point() and p.dim() > 1}
    ends = sum(p.numel() for n, p in floats.items() if _is_an_end(n))
    left = sum(p.numel() for p in floats.values())
    assert left - ends <= 0.25 * saved.report.elements, f"{left - ends} of {saved.report.elements} weights stayed float"


def test_packed_bytes_are_on_disk(method: Any, tiny: TinyModel, artefact: Make) -> None:
    """The files hold integers for every packed layer, as many bytes as the report says, and no float copy."""
    saved = artefact(method, tiny)
    stored: dict[str, Any] = {}
    for path in saved.folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            stored |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    integers = sum(t.numel() * t.element_size() for t in stored.values() if not t.is_floating_point())
    assert integers == saved.report.packed_bytes
    assert saved.report.bits_per_weight < 2 * bits_of(method)
    floats = sum(t.numel() * t.element_size() for t in stored.values() if t.is_floating_point())
    assert floats <= saved.report.other_bytes


def test_every_layer_reports_its_error(method: Any, tiny: TinyModel, artefact: Make) -> None:
    for layer in artefact(method, tiny).report.layers:
        assert layer.error is not None and 0 < layer.error < 0.3, layer


def test_report_and_card_lie_beside_the_weights(method: Any, tiny: TinyModel, artefact: Make) -> None:
    saved = artefact(method, tiny)
    report = json.loads((saved.folder / "lowbit_report.json").read_text())
    assert report["packed_bytes"] == saved.report.packed_bytes
    assert method.name in (saved.folder / "README.md").read_text()
    config = json.loads((saved.folder / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == f"lowbit_{method.name}"
    assert all(entry["kind"] in KINDS for entry in config["plan"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_other_types(
    method: Any, tiny: TinyModel, dtype: torch.dtype, artefact: Make, float_folder: Any, tmp_path: Path
) -> None:
    """Loading in another type changes no packed byte, and quantizing in another type works."""
    saved = artefact(method, tiny)
    reloaded = tiny.load(saved.folder, dtype)
    packed = {name: value for name, value in saved.tensors.items() if value.startswith("torch.int")}
    assert packed and packed.items() <= fingerprint(reloaded).items()
    assert torch.isfinite(tiny.run(reloaded)).all()
    model = quantized(method, tiny, float_folder(tiny), dtype)
    model.save_pretrained(tmp_path / "other")
    assert fingerprint(tiny.load(tmp_path / "other", dtype)) == fingerprint(model)


def test_dequantizes(method: Any, tiny: TinyModel, artefact: Make) -> None:
    saved = artefact(method, tiny)
    model = tiny.load(saved.folder, torch.float32)
    disconnect_siblings(model)
    for module in packed_modules(model).values():  # a dequantized model does not quantize its inputs
        mixer = None if module.layer_spec.mixer is None else MixerSpec()
        module.layer_spec = replace(module.layer_spec, activation=None, mixer=mixer)
    output = tiny.run(model)
    model.dequantize()
    assert not packed_modules(model)
    torch.testing.assert_close(tiny.run(model), output, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="not quantized"):
        hf_lowbit.report(model)


def _is_an_end(name: str) -> bool:
    ends = ("embed", "lm_head", "wte", "wpe", "proj_out", "embeddings", "conv1d", "dt_proj", "A_log")
    return any(end in name for end in ends)
