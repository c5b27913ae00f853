"""save() and load() for a plain nn.Module, with the files and checks of the library integrations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from hf_lowbit.config import ConfigError
from hf_lowbit.integrations.atomic import write_folder
from hf_lowbit.integrations.finish import check_loaded
from hf_lowbit.method import methods
from hf_lowbit.nn import CorruptWeightError
from hf_lowbit.plan import Plan, install, packed_modules
from hf_lowbit.reporting import REPORT_FILE
from hf_lowbit.state import QuantizationState, attach_state, state_of

CONFIG_FILE = "lowbit_config.json"
WEIGHTS_FILE = "model.safetensors"


def save(module: nn.Module, folder: str | Path) -> None:
    """Save a quantized module: ``model.safetensors``, ``lowbit_config.json``, ``lowbit_report.json``, atomically.

    Raises:
        ValueError: the module is not quantized.
    """
    state = state_of(module)
    if state is None:
        raise ValueError("this module is not quantized: call hf_lowbit.quantize first")
    tensors, tied = _unique(module.state_dict())
    buffers = {name: part._buffers.get("output_dtype") for name, part in packed_modules(module).items()}
    dtypes = {name: str(empty.dtype).removeprefix("torch.") for name, empty in buffers.items() if empty is not None}

    def write(staged: Path) -> None:
        save_file(tensors, staged / WEIGHTS_FILE, metadata={"format": "pt"})
        values = {"quantization_config": state.config.to_dict(), "tied": tied, "embedding_dtypes": dtypes}
        (staged / CONFIG_FILE).write_text(json.dumps(values, indent=2))
        if state.report is not None:
            (staged / REPORT_FILE).write_text(state.report.to_json())

    write_folder(folder, write)


def load(folder: str | Path, skeleton: nn.Module) -> nn.Module:
    """Load what :func:`save` wrote into a module of the same structure, which is changed in place and returned.

    Its float weights are not read; it may be on the meta device.

    Raises:
        FileNotFoundError, ConfigError: no or an unreadable config.
        PlanError: a planned module that the skeleton does not have.
        CorruptWeightError: missing, unexpected, misshapen or impossible tensors, or a damaged file.
    """
    folder = Path(folder)
    values = _read_config(folder / CONFIG_FILE)
    stored = values["quantization_config"]
    name = str(stored.get("quant_method", "")).removeprefix("lowbit_")
    if name not in methods():
        raise ConfigError(f"{folder} was quantized by the method {name!r}, which is not installed")
    config = methods()[name].config_class.from_dict(stored)
    plan = Plan.from_list(config.plan or [], [module for module, _ in skeleton.named_modules()])
    install(skeleton, plan, packed=True)
    tensors = _read_tensors(folder / WEIGHTS_FILE)
    for duplicate, original in values.get("tied", {}).items():
        if original not in tensors:
            raise CorruptWeightError(f"{duplicate} is tied to {original}, which {WEIGHTS_FILE} does not have")
        tensors[duplicate] = tensors[original]
    for layer, dtype in values.get("embedding_dtypes", {}).items():  # and heads that have a type
        if layer not in plan.layers or not isinstance(getattr(torch, str(dtype), None), torch.dtype):
            raise ConfigError(f"{folder / CONFIG_FILE}: there is no layer {layer!r} of type {dtype!r}")
        skeleton.get_submodule(layer).to(getattr(torch, dtype))
    _check_tensors(tensors, skeleton.state_dict())
    skeleton.load_state_dict(_as_parameters(tensors, skeleton), assign=True)
    check_loaded(skeleton, plan)
    attach_state(skeleton, QuantizationState(config, source=str(folder)))
    return skeleton


def _unique(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors without those that share another's memory, and which those are: duplicate name -> name."""
    first: dict[tuple[Any, ...], str] = {}
    unique, tied = {}, {}
    for name, tensor in tensors.items():
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.dtype) if tensor.numel() else (name,)
        if key in first:
            tied[name] = first[key]
        else:
            first[key], unique[name] = name, tensor.contiguous()
    return unique, tied


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} has no {CONFIG_FILE}: hf_lowbit.save did not write it")
    try:
        values = json.loads(path.read_text())
        parts = (values["quantization_config"], values.get("tied", {}), values.get("embedding_dtypes", {}))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} cannot be read: {error!r}") from None
    if not all(isinstance(part, dict) for part in parts):
        raise ConfigError(f"{path} was not written by hf_lowbit.save, or was edited")
    result: dict[str, Any] = values
    return result


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CorruptWeightError(f"{path} cannot be read: {error}") from None


def _as_parameters(tensors: dict[str, Tensor], skeleton: nn.Module) -> dict[str, Tensor]:
    """The tensors as parameters where the skeleton has parameters; tied ones stay one and the same."""
    wanted = dict(skeleton.named_parameters(remove_duplicate=False))
    made: dict[int, nn.Parameter] = {}
    for name, parameter in wanted.items():
        made.setdefault(id(tensors[name]), nn.Parameter(tensors[name], requires_grad=parameter.requires_grad))
    return {name: made[id(tensor)] if name in wanted else tensor for name, tensor in tensors.items()}


def _check_tensors(stored: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    missing, unexpected = sorted(set(expected) - set(stored)), sorted(set(stored) - set(expected))
    if missing or unexpected:
        raise CorruptWeightError(
            f"tensors missing: {missing[:5] or 'none'}; tensors unexpected: {unexpected[:5] or 'none'}"
        )
    for name, tensor in stored.items():
        same_kind = tensor.dtype.is_floating_point == expected[name].dtype.is_floating_point
        if tensor.shape != expected[name].shape or not same_kind:
            wanted = f"{tuple(expected[name].shape)} {expected[name].dtype}"
            raise CorruptWeightError(f"{name} is {tuple(tensor.shape)} {tensor.dtype}, but the plan says {wanted}")
