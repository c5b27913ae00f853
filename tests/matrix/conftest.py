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
    """Tests that ask for ``method`` or ``tiny`` run for every registered method and every architecture.

    Those that quantize without asking for an architecture take language models.
    """
    names, methods = metafunc.fixturenames, list(hf_lowbit.methods().values())
    if "method" in names and "tiny" in names:
        pairs = [(method, tiny) for method in methods for tiny in MODELS.values() if not is_refused(method, tiny)]
        metafunc.parametrize(("method", "tiny"), pairs, ids=[f"{method.name}-{tiny.name}" for method, tiny in pairs])
    elif "method" in names:
        quantizes = "float_folder" in names or "artefact" in names
        chosen = [method for method in methods if not (quantizes and is_refused(method, MODELS["llama"]))]
        metafunc.parametrize("method", chosen, ids=lambda method: method.name)
    elif "tiny" in names:
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


_SHORT = {
    "iterations": 3,
    "epochs": 2,
    "tau_steps": 3,
    "smooth_steps": 3,
}  # the promises do not depend on how long a method trains


def bits_of(method: Any) -> int:
    """4, or what the method is for where it takes no other."""
    try:
        method.config_class(bits=4)
    except hf_lowbit.ConfigError:
        return int(method.config_class().bits)
    return 4


def config_of(method: Any, tiny: TinyModel) -> Any:
    """A method's 4-bit config (see :func:`bits_of`), with data where it calibrates."""
    bits = bits_of(method)
    short = {name: value for name, value in _SHORT.items() if name in method.config_class.__dataclass_fields__}
    if method.config_class().low_rank is not None:  # its own branch: layers here are small
        short["low_rank"] = hf_lowbit.LowRankConfig(rank=2)
    if not method.needs_data:
        return method.config_class(bits=bits, **short)
    return method.config_class(bits=bits, dataset=data_of(tiny), num_samples=2, **short)


def data_of(tiny: TinyModel) -> list[dict[str, Any]]:
    """Calibration data: two samples, alike."""
    inputs = {key: torch.atleast_1d(torch.as_tensor(value)) for key, value in tiny.inputs(torch.float32).items()}
    return [inputs] * 2


def quantized(method: Any, tiny: TinyModel, folder: Path, dtype: torch.dtype = torch.bfloat16, **arguments: Any) -> Any:
    """A method's quantization of a checkpoint: on loading, or of the loaded model where that needs its data."""
    config = config_of(method, tiny)
    if method.needs_data and tiny.is_denoiser:  # diffusers refuses to calibrate while it loads
        return hf_lowbit.quantize(tiny.load(folder, dtype, **arguments), config)
    return tiny.load(folder, dtype, quantization_config=config, **arguments)


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
            model = quantized(method, tiny, float_folder(tiny))
            folder = tmp_path_factory.mktemp(f"{method.name}-{tiny.name}") / "packed"
            model.save_pretrained(folder, max_shard_size="20KB")
            made[key] = Artefact(folder, fingerprint(model), tiny.run(model), hf_lowbit.report(model))
        return made[key]

    return make


_SLOWEST = ("unet", "mamba", "mamba2", "llama_tied")
_DENOISERS = ("text_unet", "dit")
_MIXERS = {"quamba": ("mamba",), "quamba2": ("mamba", "mamba2")}  # state-space methods: the models they are for


def is_slow(method: Any, tiny: TinyModel) -> bool:
    """What the default run leaves to the full one.

    The slowest architectures, for methods that calibrate; GPTQ stands for them. Denoisers, but for it and round to
    nearest; for methods of diffusion models alone all but a transformer of each sort, and where the text is treated
    apart the U-Net that reads it. State-space methods run on the last generation that they are for.
    """
    if method.name in _MIXERS:
        return tiny.name != _MIXERS[method.name][-1]
    if method.domains == ("diffusion",):
        return tiny.name not in ("dit", "llama") and (method.name, tiny.name) != ("mixdq", "text_unet")
    if tiny.name in _DENOISERS:
        return method.name not in ("rtn", "gptq")
    return method.needs_data and method.name != "gptq" and tiny.name in _SLOWEST


def is_refused(method: Any, tiny: TinyModel) -> bool:
    """Whether the method's defaults ask for what the model does not have: the plugin's own tests see it refused."""
    if method.config_class.packs_mixers:
        return tiny.name not in _MIXERS.get(method.name, ("mamba", "mamba2"))
    return method.config_class().activation_timesteps and not tiny.is_denoiser


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark them."""
    for item in items:
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        if "method" in parameters and "tiny" in parameters and is_slow(parameters["method"], parameters["tiny"]):
            item.add_marker(pytest.mark.slow)
