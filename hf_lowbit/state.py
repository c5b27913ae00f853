"""What hf_lowbit knows of a quantized model object: its config, its report, its adapter."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from hf_lowbit.config import LowbitConfig
from hf_lowbit.nn import PackedModule, connect_siblings
from hf_lowbit.nn.timestep import attach_timestep, detach_timestep
from hf_lowbit.reporting import Report

_ATTRIBUTE = "_lowbit_state"
_LAYER_ATTRIBUTE = "_lowbit_config"


@dataclass
class QuantizationState:
    """Attached to the outermost quantized module.

    Attributes:
        config: with the final plan.
        report: of quantization; None for a reloaded model until somebody asks.
        source: folder or repository the model was loaded from, if any.
        adapters: module name -> (A, B) of a compensation adapter that has not been attached through PEFT.
    """

    config: LowbitConfig
    report: Report | None = None
    source: str | None = None
    adapters: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


def attach_state(model: nn.Module, state: QuantizationState) -> None:
    """Remember the state on the model object, and its config on every packed module: no parameters or submodules.

    The packed modules take the config's backend, siblings compute together from now on, and the model tells its layers
    the timestep it is called at, if they need it.
    """
    object.__setattr__(model, _ATTRIBUTE, state)
    for module in model.modules():
        if isinstance(module, PackedModule):
            object.__setattr__(module, _LAYER_ATTRIBUTE, state.config)
            module.backend = state.config.backend
    connect_siblings(model)
    attach_timestep(model)


def detach_state(model: nn.Module) -> None:
    """Forget it, after dequantizing."""
    model.__dict__.pop(_ATTRIBUTE, None)
    detach_timestep(model)


def state_of(model: Any) -> QuantizationState | None:
    """The state of a quantized model, looked up through wrappers such as PEFT's; None if it is not quantized."""
    if isinstance(model, nn.Module):
        for module in model.modules():
            if _ATTRIBUTE in module.__dict__:
                state: QuantizationState = module.__dict__[_ATTRIBUTE]
                return state
    return None


def config_of(module: PackedModule) -> LowbitConfig | None:
    """The config a packed module was quantized with, wherever it is now; None outside quantized models."""
    config: LowbitConfig | None = module.__dict__.get(_LAYER_ATTRIBUTE)
    return config


def shared_weights(model: nn.Module) -> tuple[frozenset[str], ...]:
    """Sets of module names whose ``weight`` is one and the same parameter."""
    owners: dict[int, set[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        weight = module._parameters.get("weight")
        if weight is not None:
            owners.setdefault(id(weight), set()).add(name)
    return tuple(frozenset(names) for names in owners.values() if len(names) > 1)
