"""Products of few tokens are found once, and again as soon as anything that they depend on is another."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hf_lowbit.formats import PackedTensor, WeightSpec
from hf_lowbit.kernels import cpu, known, packed_linear, packed_linears
from hf_lowbit.kernels.reference import reference_product
from hf_lowbit.rounding import round_to_nearest

ROWS, COLUMNS = 48, 64
SPEC = WeightSpec(bits=4, group_size=32)


def packed_like(spec: WeightSpec = SPEC, rows: int = ROWS, seed: int = 0) -> PackedTensor:
    generator = torch.Generator().manual_seed(seed)
    return round_to_nearest(torch.randn(rows, COLUMNS, generator=generator), spec)


def inputs(*leading: int, seed: int = 1) -> Tensor:
    return torch.randn(*leading, COLUMNS, generator=torch.Generator().manual_seed(seed))


def assert_right(x: Tensor, packed: PackedTensor, backend: str | None = None) -> None:
    y = packed_linear(x, packed, None, backend)
    expected = reference_product(x.detach().reshape(-1, COLUMNS).float(), packed, None).view(y.shape)
    assert y.dtype == x.dtype
    torch.testing.assert_close(y.float(), expected, rtol=2e-2 if x.dtype == torch.bfloat16 else 1e-4, atol=0.1)


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many matrices each product has that was looked for."""
    monkeypatch.setattr(known, "_known", {})
    made: list[int] = []
    find = known._find

    def counted(x: Tensor, weights: list[PackedTensor], backend: str | None) -> known.Product | None:
        made.append(len(weights))
        return find(x, weights, backend)

    monkeypatch.setattr(known, "_find", counted)
    return made


def test_the_same_again_is_not_looked_for(found: list[int]) -> None:
    packed = packed_like()
    for seed in range(3):
        assert_right(inputs(1, 1, seed=seed), packed)
    assert found == [1]


CHANGES: dict[str, Callable[[Tensor, PackedTensor], tuple[Tensor, PackedTensor, str | None]]] = {
    "shape": lambda x, packed: (inputs(2, 1), packed, None),
    "dimensions": lambda x, packed: (inputs(1), packed, None),
    "type": lambda x, packed: (x.bfloat16(), packed, None),
    "weights moved": lambda x, packed: (x, replace(packed, weight=packed.weight.clone()), None),
    "scales moved": lambda x, packed: (x, replace(packed, scale=packed.scale.clone() * 0 + 16256), None),
    "another format": lambda x, packed: (x, replace(packed, spec=WeightSpec("nf", bits=4, group_size=32)), None),
    "some rows": lambda x, packed: (x, packed.rows(slice(0, 16)), None),
    "a forced backend": lambda x, packed: (x, packed, "reference"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_differs_is_another_product(change: str, found: list[int]) -> None:
    x, packed = inputs(1, 1), packed_like()
    assert_right(x, packed)
    other, changed, backend = CHANGES[change](x, packed)
    assert_right(other, changed, backend)
    assert found == [1, 1]
    assert_right(x, packed)  # still known
    assert found == [1, 1]


def test_what_is_written_to_the_same_place_is_read_from_there(found: list[int]) -> None:
    x, packed = inputs(1, 1), packed_like()
    assert_right(x, packed)
    other = packed_like(seed=7)
    packed.weight.copy_(other.weight)
    packed.scale.copy_(other.scale)
    assert torch.equal(packed_linear(x, packed), packed_linear(x, other))
    assert found == [1, 1]  # the other's


@pytest.mark.parametrize("part", ["weight", "scale", "zero_point"])
def test_tensors_that_lie_otherwise_at_the_same_address_are_not_known(part: str, found: list[int]) -> None:
    x, packed = inputs(1, 1), packed_like(WeightSpec(bits=4, group_size=32, symmetric=False, real_zero_point=True))
    tensor = getattr(packed, part)
    room = torch.zeros(2 * tensor.shape[0], tensor.shape[1], dtype=tensor.dtype)
    room[: len(tensor)] = tensor
    assert_right(x, replace(packed, **{part: room[: len(tensor)]}))
    room.zero_()[::2] = tensor
    assert_right(x, replace(packed, **{part: room[::2]}))
    assert found == [1]


def test_inputs_that_lie_otherwise_are_not_known(found: list[int]) -> None:
    packed = packed_like()
    assert_right(inputs(COLUMNS).t()[:1], packed)
    assert packed_linear(inputs(0), packed).shape == (0, ROWS)
    assert found == [1]  # of no tokens: that there is no product


@pytest.mark.parametrize("takes_any_number", [True, False])
def test_many_tokens_are_known_whatever_their_number(takes_any_number: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known, "_known", {})
    monkeypatch.setattr(known.cpu, "multiplies_many", lambda matrix, dtype: takes_any_number)
    weights = [packed_like(rows=rows) for rows in (16, 48)]
    for leading in ((known.MOST_TOKENS + 1,), (2, 40), (70,)):
        x = inputs(*leading).bfloat16()
        product = known.known_products(x, weights, None)
        assert (product is not None) == takes_any_number
        for packed, y in zip(weights, product(x) if product else packed_linears(x, weights), strict=True):
            assert y.shape == (*leading, len(packed.weight))
            assert torch.equal(y, packed_linear(x, packed))
            assert_right(x, packed)
    assert {inputs[0] for inputs in known._known} == {None}


def test_several_matrices_are_one_product(found: list[int]) -> None:
    x, weights = inputs(2, 3), [packed_like(rows=rows) for rows in (16, 48)]
    for _ in range(2):
        for y, packed in zip(packed_linears(x, weights), weights, strict=True):
            assert y.shape == (2, 3, len(packed.weight))
            assert torch.equal(y, packed_linear(x, packed))
    assert found == [2, 1, 1]


def test_columns_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="inputs of 32 columns"):
        packed_linear(torch.randn(1, COLUMNS - 32), packed_like())


def test_weights_are_not_kept_alive(found: list[int]) -> None:
    packed = packed_like()
    assert_right(inputs(1, 1), packed)
    alive = [weakref.ref(packed.weight), weakref.ref(packed.scale)]
    del packed
    assert [reference() for reference in alive] == [None, None]


def test_it_does_not_grow_without_end(found: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known, "_MOST_KNOWN", 2)
    packed = packed_like()
    for tokens in (1, 2, 3, 1):
        assert_right(inputs(tokens), packed)
    assert found == [1, 1, 1, 1] and len(known._known) == 2


def test_gradients_autocast_and_inference_mode(found: list[int]) -> None:
    x, packed = inputs(1, 1), packed_like()
    plain = packed_linear(x, packed)
    wanted = x.clone().requires_grad_()
    packed_linear(wanted, packed).sum().backward()
    expected = torch.autograd.grad(reference_product(other := x[0].clone().requires_grad_(), packed, None).sum(), other)
    assert wanted.grad is not None
    torch.testing.assert_close(wanted.grad[0], expected[0], rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert packed_linear(x, packed).dtype == torch.bfloat16
    with torch.inference_mode():
        assert torch.equal(packed_linear(x, packed), plain)
    assert found == [1, 1]  # float32 and bfloat16


def test_threads_and_instruction_sets_are_asked_at_every_call(found: list[int]) -> None:
    assert cpu.available(), cpu.unavailable_because()
    x, packed, before = inputs(1, 1), packed_like(), torch.get_num_threads()
    try:
        for name in cpu.instruction_sets():
            cpu.use_instruction_set(name)
            torch.set_num_threads(1 + len(name) % 2)
            assert_right(x, packed)
    finally:
        cpu.use_instruction_set(None)
        torch.set_num_threads(before)
    assert found == [1]
