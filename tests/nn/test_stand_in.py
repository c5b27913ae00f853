"""Owners that cast what a layer reads to the type of its weight: asked of a packed layer, it is a float type."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from hf_lowbit.formats import WeightSpec
from hf_lowbit.nn import LayerSpec, PackedLinear, PackedModule, answer_owner

Pack = Callable[[nn.Module, LayerSpec], PackedModule]


class Owner(nn.Module):
    """Casts as transformers' Mamba does, and can be made to fail or to wait behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16, 8, bias=False)
        self.before: Callable[[], object] = int

    def forward(self, x: Tensor) -> Tensor:
        """Forward."""
        self.before()
        return self.head(x.to(self.head.weight.dtype)).float()


@pytest.fixture
def owner(pack: Pack) -> Owner:
    """Its head is packed and answers."""
    owner = Owner()
    owner.head.weight.data = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    owner.head = pack(owner.head, LayerSpec(WeightSpec()))  # type: ignore[assignment]
    answer_owner(owner, "head", torch.float32)
    answer_owner(owner, "head", torch.float32)  # harmless
    return owner


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(1))


def is_at_rest(owner: nn.Module) -> bool:
    """Whether nothing is left of a call."""
    return isinstance(owner.head, PackedLinear) and owner.head.is_packed() and "head" not in owner.__dict__


def test_it_computes_as_the_layer_does(owner: Owner, x: Tensor) -> None:
    before = list(owner.state_dict())
    assert torch.equal(owner(x), owner.head(x)) and float(owner(x).abs().min()) > 0
    assert is_at_rest(owner) and list(owner.state_dict()) == before
    assert len(owner._forward_pre_hooks) == len(owner._forward_hooks) == 1
    assert torch.equal(copy.deepcopy(owner)(x), owner(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_type_follows_the_models(owner: Owner, x: Tensor, dtype: torch.dtype) -> None:
    seen = []
    owner.to(dtype).head.register_forward_pre_hook(lambda layer, args: seen.append(args[0].dtype))
    owner(x)
    assert seen == [dtype]


def test_a_failure_leaves_nothing_behind(owner: Owner, x: Tensor) -> None:
    owner.before = lambda: [][0]  # type: ignore[assignment]
    with pytest.raises(IndexError):
        owner(x)
    assert is_at_rest(owner)


def test_a_float_layer_in_its_place_speaks_for_itself(owner: Owner, x: Tensor) -> None:
    owner.head = owner.head.to_float(torch.float64)  # type: ignore[operator]
    owner.before = lambda: type(owner.head) is nn.Linear or [][0]
    assert torch.equal(owner(x), owner.head(x.double()).float())


def test_integers_are_refused(owner: Owner, x: Tensor) -> None:
    with pytest.raises(TypeError, match=r"was given torch\.int32.* Call the model itself"):
        owner.forward(x)


def test_threads_do_not_disturb_each_other(owner: Owner, x: Tensor) -> None:
    """The second begins before the first ends, and reads after it has ended."""
    expected, first_ended, second_began, results = owner(x), threading.Event(), threading.Event(), {}
    steps = {
        "first": lambda: second_began.wait(20),
        "second": lambda: (second_began.set(), first_ended.wait(20)),
    }
    owner.before = lambda: steps[threading.current_thread().name]()

    def run(ended: threading.Event) -> None:
        results[threading.current_thread().name] = owner(x)
        ended.set()

    threads = [threading.Thread(target=run, args=[event], name=name) for name, event in
               (("first", first_ended), ("second", threading.Event()))]  # fmt: skip
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert set(results) == {"first", "second"} and all(torch.equal(y, expected) for y in results.values())
    assert is_at_rest(owner)


def test_compiled_whole_it_is_the_same(owner: Owner, x: Tensor) -> None:
    expected = owner(x)
    compiled = torch.compile(owner, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(x), expected)
    assert is_at_rest(owner)
