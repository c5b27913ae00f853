"""Kernels are called by address where nothing else has to see the call; elsewhere operators are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from hf_lowbit.formats import WeightSpec
from hf_lowbit.kernels import is_eager, packed_linear
from hf_lowbit.rounding import round_to_nearest

PACKED = round_to_nearest(torch.randn(48, 64, generator=torch.Generator().manual_seed(0)), WeightSpec(group_size=32))
X = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))


class Subclass(Tensor):
    """An ordinary one."""


class Listening(TorchDispatchMode):
    """Notes the operators that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def linear(x: Tensor) -> Tensor:
    return packed_linear(x, PACKED)


def test_ordinary_tensors_are_multiplied_directly() -> None:
    for x in (X, nn.Parameter(X), X.clone().requires_grad_()):
        assert is_eager(x)
    with torch.inference_mode():
        assert is_eager(X.clone())
    with torch.autocast("cpu", torch.bfloat16), torch.device("cpu"):
        assert is_eager(X)


def judged(run: Callable[[Callable[[Tensor], Tensor]], Any]) -> bool:
    """What :func:`is_eager` says of the tensor that a function is called with."""
    said: list[bool] = []

    def function(x: Tensor) -> Tensor:
        said.append(is_eager(x))
        return x.sum()

    run(function)
    return said[0]


@pytest.mark.parametrize(
    "run",
    [
        lambda f: make_fx(f)(X),
        lambda f: torch.jit.trace(f, X),
        lambda f: torch.vmap(f)(X),
        lambda f: torch.func.grad(f)(X),
        lambda f: torch.func.jvp(f, (X,), (X,)),
        lambda f: f(X.as_subclass(Subclass)),
        lambda f: f(FakeTensorMode().from_tensor(X)),
    ],
    ids=["make_fx", "jit", "vmap", "grad", "jvp", "subclass", "fake"],
)
def test_whatever_has_to_see_the_call_is_noticed(run: Callable[[Callable[[Tensor], Tensor]], Any]) -> None:
    assert not judged(run)


def test_graphs_hold_the_operator() -> None:
    expected = linear(X)
    traced = make_fx(linear)(X)
    assert "hf_lowbit.linear" in traced.code
    assert torch.equal(traced(X), expected)
    scripted = torch.jit.trace(linear, X)
    assert torch.equal(scripted(2 * X), linear(2 * X))


def test_modes_see_the_operator() -> None:
    with Listening() as mode:
        y = linear(X)
    assert mode.seen.count("hf_lowbit.linear.default") == 1
    assert torch.equal(y, linear(X))


def test_fake_tensors_have_the_right_shape() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        y = linear(mode.from_tensor(X))
    assert y.shape == (3, 48) and y.dtype == X.dtype


def test_vmap_goes_through_the_operator() -> None:
    torch.testing.assert_close(torch.vmap(linear)(X), linear(X))
