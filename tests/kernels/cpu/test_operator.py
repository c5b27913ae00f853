"""The native operator of compiled graphs: the same numbers as Python's, and what it leaves to Python."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_lowbit.formats import ActivationSpec, PackedTensor, WeightSpec
from hf_lowbit.kernels import KeptMatrix, cpu, kept_product, ops
from hf_lowbit.kernels.described import told
from hf_lowbit.kernels.kept import KEPT_PRODUCTS
from hf_lowbit.kernels.products import products
from hf_lowbit.rounding import round_to_nearest
from tests.kernels.cpu.matrices import FORMATS, random_packed


@pytest.fixture(autouse=True)
def native() -> None:
    assert cpu.available(), cpu.unavailable_because()


def operator(x: Tensor, matrices: Sequence[PackedTensor], activation: ActivationSpec | None = None) -> list[Tensor]:
    stored = [tensor for packed in matrices for tensor in ops._stored(packed)]
    specs = f"[{', '.join(told(packed.spec) for packed in matrices)}]"
    flat = torch.ops.hf_lowbit.products(x, stored, specs, matrices[0].columns, told(activation) if activation else "")
    return parts_of(flat, x, matrices)


def operator_of_kept(x: Tensor, kept: Sequence[KeptMatrix], matrices: Sequence[PackedTensor]) -> list[Tensor]:
    rows = sum(matrix.rows for matrix in kept)
    return parts_of(torch.ops.hf_lowbit.kept_products(x, [matrix.number for matrix in kept], rows, ""), x, matrices)


def parts_of(flat: Tensor, x: Tensor, matrices: Sequence[PackedTensor]) -> list[Tensor]:
    sizes = [x[..., 0].numel() * packed.weight.shape[0] for packed in matrices]
    shapes = [(*x.shape[:-1], packed.weight.shape[0]) for packed in matrices]
    return [part.view(shape) for part, shape in zip(flat.split(sizes), shapes, strict=True)]


KEPT: list[Any] = []  # what the operator knows by its address, which no other test's matrices may get


def of_python(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts of matrices in products that came to Python from now on."""
    calls: list[int] = []

    def counted(
        x: Tensor, matrices: list[PackedTensor], activation: ActivationSpec | None, backend: None
    ) -> list[Tensor]:
        calls.append(len(matrices))
        return products(x, matrices, activation, backend)

    monkeypatch.setattr(ops.products, "products", counted)
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_comes_to_python_once_and_is_the_same(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = of_python(monkeypatch)
    matrices = [random_packed(rows, 96, group_size=32, **FORMATS[name]) for rows in (24, 7)]
    KEPT.append(matrices)
    for tokens in (1, 3):
        x = torch.randn(tokens, 1, 96, generator=torch.Generator().manual_seed(tokens)).to(dtype)
        for _ in range(2):
            results = operator(x, matrices)
            assert [result.shape for result in results] == [(tokens, 1, 24), (tokens, 1, 7)]
            for result, expected in zip(results, products(x, matrices, None, None), strict=True):
                assert result.dtype == dtype
                assert torch.equal(result, expected)
    assert calls == [2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_kept_matrices_go_by_their_numbers(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = of_python(monkeypatch)
    matrices = [random_packed(rows, 96, group_size=32, **FORMATS[name]) for rows in (24, 7)]
    kept = [KeptMatrix(packed) for packed in matrices]
    for order in ((0, 1), (1, 0), (0,)):  # each of them is told to the library once
        chosen, given = [kept[i] for i in order], [matrices[i] for i in order]
        for tokens in (1, 3):
            x = torch.randn(tokens, 96, generator=torch.Generator().manual_seed(tokens)).to(dtype)
            for _ in range(2):
                expected = products(x, given, None, None)
                for result, right in zip(operator_of_kept(x, chosen, given), expected, strict=True):
                    assert torch.equal(result, right)
    assert calls == [2, 2, 1]


@pytest.mark.parametrize("bits", [4, 8])
def test_inputs_of_kept_matrices_are_quantized(bits: int) -> None:
    packed, activation = random_packed(24, 96, group_size=32, **FORMATS["int4"]), ActivationSpec("int", bits)
    kept, x = KeptMatrix(packed), torch.randn(2, 3, 96)
    for _ in range(2):
        assert torch.equal(kept_product(x, kept, activation), products(x, [packed], activation, None)[0])


def test_matrices_that_are_no_longer_kept_are_refused() -> None:
    packed, x = random_packed(24, 96, group_size=32, **FORMATS["int4"]), torch.randn(1, 96)
    kept, others = KeptMatrix(packed), KeptMatrix(packed)
    operator_of_kept(x, [others, kept], [packed, packed])
    number = kept.number
    del kept
    for numbers in ([number], [others.number, number]):
        with pytest.raises(RuntimeError, match="the weights of this compiled graph are no more: compile the model"):
            torch.ops.hf_lowbit.kept_products(x, numbers, 24 * len(numbers), "")
    assert torch.equal(kept_product(x, others, None), products(x, [packed], None, None)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation_group", [None, 32])
@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("name", ["int8", "int4", "int4-zero", "int2", "ternary"])
def test_quantizes_inputs_as_python_does(
    name: str, bits: int, activation_group: int | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, activation = of_python(monkeypatch), ActivationSpec("int", bits, group_size=activation_group)
    matrices = [random_packed(rows, 96, group_size=32, **FORMATS[name]) for rows in (24, 7)]
    KEPT.append(matrices)
    for tokens in (1, 5):
        x = torch.randn(tokens, 96, generator=torch.Generator().manual_seed(tokens)).to(dtype)
        x[-1, 40:60] *= 30
        for _ in range(2):
            for result, expected in zip(
                operator(x, matrices, activation), products(x, matrices, activation, None), strict=True
            ):
                assert result.dtype == dtype
                assert torch.equal(result, expected)
    assert calls in ([2], [])  # none where the same lay there in an earlier test


def test_inputs_with_other_groups_than_the_weight_stay_with_python(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, matrix, x = of_python(monkeypatch), random_packed(16, 96, group_size=32, bits=4), torch.randn(1, 96)
    for _ in range(2):
        operator(x, [matrix], ActivationSpec("int", 8, group_size=48))
    assert calls == [1, 1]


def test_one_matrix_with_and_without_quantized_inputs() -> None:
    """What is known of it is told apart by the text of the activation."""
    matrix, x = random_packed(16, 64, **FORMATS["int4"]), torch.randn(1, 64)
    for activation in (None, ActivationSpec("int", 8), None, ActivationSpec("int", 4), ActivationSpec("int", 8)):
        for _ in range(2):
            (result,) = operator(x, [matrix], activation)
            assert torch.equal(result, products(x, [matrix], activation, None)[0])


def test_what_it_does_not_know_goes_to_python(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = random_packed(16, 64, bits=4, group_size=32)
    operator(torch.randn(1, 64), [packed])
    calls = of_python(monkeypatch)
    apart = torch.randn(64, 3).t()  # not contiguous
    assert torch.equal(operator(apart, [packed])[0], products(apart, [packed], None, None)[0])
    double = torch.randn(1, 64, dtype=torch.float64)
    torch.testing.assert_close(operator(double, [packed])[0], products(double, [packed], None, None)[0])
    assert operator(torch.randn(0, 64), [packed])[0].shape == (0, 16)
    assert calls == [1, 1, 1]


def test_a_weight_in_the_place_of_another_is_not_taken_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = random_packed(16, 64, bits=4, group_size=32)
    operator(torch.randn(1, 64), [packed])
    calls = of_python(monkeypatch)
    rows = PackedTensor(packed.weight[:8], packed.scale[:8], packed.spec, packed.columns)
    other = PackedTensor(packed.weight, packed.scale.clone(), packed.spec, packed.columns)
    read = PackedTensor(packed.weight, packed.scale, WeightSpec(format="nf", bits=4, group_size=32), packed.columns)
    x = torch.randn(1, 64)
    for changed in (rows, other, read, packed):
        assert torch.equal(operator(x, [changed])[0], products(x, [changed], None, None)[0])
    assert calls == [1, 1, 1, 1]


def test_written_to_in_place_it_reads_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    packed, x = random_packed(16, 64, bits=4, group_size=32), torch.randn(1, 64)
    before = operator(x, [packed])[0]
    calls = of_python(monkeypatch)
    packed.weight.copy_(random_packed(16, 64, bits=4, group_size=32, scale_dtype="float32").weight.flip(0))
    after = operator(x, [packed])[0]
    assert calls == []
    assert not torch.equal(before, after)
    assert torch.equal(after, products(x, [packed], None, None)[0])


def test_errors_name_the_reason() -> None:
    packed = round_to_nearest(torch.randn(16, 64), WeightSpec(bits=4))
    operator(torch.randn(1, 64), [packed])
    with pytest.raises(RuntimeError, match=r"32 columns|products_of_python"):  # torch 2.13 knows the message
        operator(torch.randn(1, 32), [packed])


def test_keeps_torchs_contract() -> None:
    packed = round_to_nearest(torch.randn(16, 64), WeightSpec(bits=4, group_size=32))
    arguments = (torch.randn(3, 64), ops._stored(packed), f"[{told(packed.spec)}]", packed.columns, "")
    with torch.no_grad():
        torch.library.opcheck(ops.PRODUCTS, arguments)
        kept = KeptMatrix(packed)
        torch.library.opcheck(KEPT_PRODUCTS, (torch.randn(3, 64), [kept.number], 16, ""))
