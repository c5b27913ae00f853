"""Which planned layers can have their compensation in an adapter: those that PEFT's LoRA repeats exactly."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from torch import nn

from hf_lowbit.nn.state_space.names import GENERATIONS
from hf_lowbit.plan.patterns import generalise
from hf_lowbit.plan.plan import PlanError, PlannedLayer

# PEFT refuses these: their owner reads their weights past any adapter when it runs fused kernels.
_MAMBA_TYPES = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")
_READ_BY_MAMBA = ("conv1d", "out_proj")


def check_adapters(model: nn.Module, layers: Mapping[str, PlannedLayer]) -> None:
    """Refuse a compensation adapter on layers that PEFT cannot adapt.

    Args:
        layers: those that are compensated.

    Raises:
        PlanError: naming them, and ``keep="branch"``, which has no such limits; or PEFT is not installed.
    """
    if find_spec("peft") is None:
        raise PlanError('low_rank keep="adapter" needs PEFT: pip install "hf_lowbit[peft]", or use keep="branch"')
    problems: dict[str, list[str]] = {}
    for name, layer in layers.items():
        if reason := _refusal(layer.kind, name, model):
            problems.setdefault(reason, []).append(generalise(name))
    if problems:
        text = "; ".join(f"{', '.join(dict.fromkeys(names))}: {reason}" for reason, names in problems.items())
        raise PlanError(
            f'low_rank keep="adapter" needs layers that PEFT can adapt ({text}); use keep="branch", or leave these '
            "layers in full precision with modules_to_not_convert"
        )


def _refusal(kind: str, name: str, model: nn.Module) -> str | None:
    module: Any = model.get_submodule(name)
    if kind == "experts":
        return "LoRA does not reach fused experts"
    if kind in GENERATIONS:
        return "LoRA does not reach the A_log and D of a mixer"
    if kind in ("conv1d", "conv2d"):
        if module.groups > 1:
            return "LoRA on a grouped convolution has another shape"
        if any(step != 1 for step in module.dilation) or module.padding_mode != "zeros":
            return "LoRA ignores a convolution's dilation and padding mode"
    if (
        name.rpartition(".")[2] in _READ_BY_MAMBA
        and getattr(getattr(model, "config", None), "model_type", None) in _MAMBA_TYPES
    ):
        return "PEFT refuses it in Mamba models"
    return None
