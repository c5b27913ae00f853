"""Packed layers whose owner reads the type of their weight.

transformers' Mamba casts what its head reads to ``self.lm_head.weight.dtype``: of codes that is int32, and the cast
would lose everything. While such an owner's forward runs, its attribute is a stand-in, whose weight has the type that
the float weight would have and whose call is the layer's. The module tree, parameters and files know nothing of it.
"""

from __future__ import annotations

import threading
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_lowbit.nn.linear import PackedLinear

_LOCK = threading.Lock()  # threads may call one model at the same time


class StandIn:
    """What the owner's attribute is meanwhile.

    Attributes:
        weight: empty, of the float type.
        calls: of the owner that are running.
    """

    def __init__(self, layer: nn.Module, weight: Tensor) -> None:
        self._layer, self.weight, self.calls = layer, weight, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._layer(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


def answer_owner(owner: nn.Module, child: str, dtype: torch.dtype) -> None:
    """Have ``owner.<child>.weight.dtype`` answered with a float type whenever the owner is called.

    The type is ``dtype``, and follows ``.to(dtype)`` as a float weight's would. It is answered through layers of LoRA
    around the packed one, too, and no more once a float layer is in its place. Calling this twice is harmless.
    """
    packed = _packed_within(owner._modules[child])
    if packed is None:
        return
    if "output_dtype" not in packed._buffers:
        packed.register_buffer("output_dtype", torch.empty(0, dtype=dtype, device="cpu"), persistent=False)
        packed.register_forward_pre_hook(_refuse_integers)
    hooks = [hook for hook in owner._forward_pre_hooks.values() if isinstance(hook, partial)]
    if not any(hook.func is _begin and hook.args == (child,) for hook in hooks):
        owner.register_forward_pre_hook(partial(_begin, child))
        owner.register_forward_hook(partial(_end, child), always_call=True)


def _begin(child: str, owner: nn.Module, args: Any) -> None:
    with _guard():
        stand_in = owner.__dict__.get(child)
        if stand_in is None:
            layer = owner._modules[child]
            packed = _packed_within(layer)
            if layer is None or packed is None:
                return
            stand_in = owner.__dict__[child] = StandIn(layer, packed.get_buffer("output_dtype"))
        stand_in.calls += 1


def _end(child: str, owner: nn.Module, args: Any, output: Any) -> None:
    with _guard():
        stand_in = owner.__dict__.get(child)
        if stand_in is not None:
            stand_in.calls -= 1
            if stand_in.calls <= 0:
                del owner.__dict__[child]


def _guard() -> Any:
    """Nothing while a graph is traced: it keeps no stand-in, and the compiler knows no locks."""
    return nullcontext() if torch.compiler.is_compiling() else _LOCK


def _packed_within(layer: nn.Module | None) -> PackedLinear | None:
    modules = () if layer is None else layer.modules()
    return next((module for module in modules if isinstance(module, PackedLinear)), None)


def _refuse_integers(layer: nn.Module, args: Any) -> None:
    if args and isinstance(args[0], Tensor) and not args[0].is_floating_point():
        raise TypeError(
            f"this {type(layer).__name__} was given {args[0].dtype}: its owner cast what it reads to the type of the "
            "codes. Call the model itself, not its method forward, so that its hooks run"
        )
