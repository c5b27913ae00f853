"""Every Triton product against the torch reference: on a GPU, or in Triton's interpreter (TRITON_INTERPRET=1)."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from hf_lowbit.formats import ActivationSpec, PackedTensor, decode
from hf_lowbit.kernels import kernel_of, packed_linear, packed_linears, quantize_tokens, triton
from hf_lowbit.kernels.triton import blocks, dense_blocks
from hf_lowbit.kernels.triton.products import suits_wide
from tests.kernels.cpu.matrices import FORMATS, random_packed

DEVICE = "cpu" if triton.interpreted() else "cuda"
# numpy has no bfloat16, and the interpreter is slow
DTYPES = (torch.float32, torch.float16) if triton.interpreted() else tuple(triton.FLOAT_TYPES)
ACTIVATIONS = (
    None,
    ActivationSpec("int", 8),
    ActivationSpec("int", 8, symmetric=False),
    ActivationSpec("float8_e4m3fn", 8),
)
ACTIVATIONS = ACTIVATIONS[:1] if triton.interpreted() else ACTIVATIONS  # codes are multiplied in bfloat16
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}
SHAPES = ((33, 576), (7, 101)) if triton.interpreted() else ((1, 192), (33, 576), (7, 101), (70, 1024))
TOKENS = (1, 5) if triton.interpreted() else (1, 5, 12, 17, 70)


def moved(packed: PackedTensor) -> PackedTensor:
    """The same on the device."""
    parts = {f.name: getattr(packed, f.name) for f in dataclasses.fields(packed)}
    return PackedTensor(**{name: part.to(DEVICE) if isinstance(part, Tensor) else part for name, part in parts.items()})


def inputs(tokens: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(tokens)) / 128
    return x.to(dtype).to(DEVICE)


def relative(y: Tensor, x: Tensor, packed: PackedTensor) -> float:
    """Norm of the error over that of the product of magnitudes, to which rounding errors are proportional."""
    weight, x = decode(packed).double(), x.double().cpu()
    return float((y.double().cpu() - x @ weight.t()).norm() / (x.abs() @ weight.abs().t()).norm())


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("group_size", (None, "tensor", 32, 64, 128))
def test_equals_the_reference(name: str, group_size: int | str | None) -> None:
    for rows, columns in SHAPES:
        if isinstance(group_size, int) and columns % group_size:
            continue
        packed = random_packed(rows, columns, group_size=group_size, **FORMATS[name])
        for dtype in DTYPES:
            if "e5m2" in name and dtype == torch.float16:
                continue  # its largest values, scaled, are too large
            matrix = triton.describe(moved(packed), dtype)
            assert matrix is not None
            assert torch.equal(triton.decode_rows(matrix, slice(None), dtype).cpu(), decode(packed, dtype))
            for tokens in TOKENS:
                x = inputs(tokens, columns, dtype)
                y = triton.linear(x, matrix)
                assert y.dtype == dtype and y.shape == (tokens, rows)
                assert relative(y, x, packed) < TOLERANCE[dtype]


@pytest.mark.parametrize("name", ("int2", "int4", "int8"))
@pytest.mark.parametrize("group_size", (None, 128, 64))
def test_common_widths_are_multiplied_as_they_are_read(name: str, group_size: int | None) -> None:
    matrix = triton.describe(moved(random_packed(8, 512, group_size=group_size, **FORMATS[name])), torch.float16)
    assert matrix is not None and triton.is_fused(matrix)


@pytest.mark.parametrize("name", ("int1", "int2", "int3", "int6", "fp_e3m2", "ternary"))
@pytest.mark.parametrize("group_size", (None, 32, 64, 128, 512))
def test_scales_of_the_type_of_the_inputs(name: str, group_size: int | None) -> None:
    """They multiply weights where a slice has several groups."""
    dtype = torch.float16 if triton.interpreted() else torch.bfloat16
    scale_dtype = str(dtype).removeprefix("torch.")
    for rows, columns in ((33, 1024), (5, 1536)):
        packed = random_packed(rows, columns, group_size=group_size, scale_dtype=scale_dtype, **FORMATS[name])
        matrix = triton.describe(moved(packed), dtype)
        assert matrix is not None and triton.is_fused(matrix)
        for tokens in TOKENS[:3]:
            x = inputs(tokens, columns, dtype)
            assert relative(triton.linear(x, matrix), x, packed) < TOLERANCE[dtype]


@pytest.mark.parametrize("name", ("int2", "int4", "int8", "nf4"))
@pytest.mark.parametrize(("group_size", "parts"), ((None, 1), (128, 1), (256, 1), (128, 2), (256, 3)))
def test_some_hundred_tokens(name: str, group_size: int | None, parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On matrices that are large enough: here, all. Parts of their columns are summed apart."""
    monkeypatch.setattr("hf_lowbit.kernels.triton.products.is_wide", lambda *_: True)
    monkeypatch.setattr(blocks, "wide_parts", lambda *_: parts)
    dtype = torch.float16 if triton.interpreted() else torch.bfloat16
    scale_dtype = str(dtype).removeprefix("torch.")
    packed = random_packed(130, 512, group_size=group_size, scale_dtype=scale_dtype, **FORMATS[name])
    matrix = triton.describe(moved(packed), dtype)
    assert matrix is not None
    for tokens in (33, 70) if triton.interpreted() else (33, 64, 65, 128, 200, 256):
        x = inputs(tokens, 512, dtype)
        assert suits_wide(x, matrix)
        assert relative(triton.linear(x, matrix), x, packed) < TOLERANCE[dtype]


def test_few_rows_are_multiplied_in_parts() -> None:
    """As many as fill a GPU, of a dozen slices at least, and of 4 bits alone."""
    assert [blocks.wide_parts(tokens, 4096, 4, 32, 112) for tokens in (64, 256)] == [8, 4]
    assert [blocks.wide_parts(64, rows, 4, 32, 32) for rows in (4096, 14336, 28672)] == [2, 2, 1]
    assert blocks.wide_parts(64, 4096, 8, 32, 112) == blocks.wide_parts(64, 4096, 4, 16, 224) == 1
    assert blocks.is_wide(64, 4, 4096, 32, 112) and not blocks.is_wide(64, 4, 4096, 32, 32)


def test_formats_and_sizes_for_the_kernel_for_many_tokens() -> None:
    def suits(rows: int, columns: int, **fields: object) -> bool:
        matrix = triton.describe(moved(random_packed(rows, columns, **fields)), torch.float16)
        assert matrix is not None
        return dense_blocks.suits(matrix)

    for group in (None, 64, 128, 256):
        assert suits(16, 768, bits=4, group_size=group)
    assert not suits(16, 768, bits=4, group_size=32)  # a stage of 64 columns has one scale of a row
    assert not suits(16, 768, bits=4, group_size=192)
    assert not suits(16, 768, bits=4, group_size="tensor")
    assert not suits(16, 768, bits=4, group_size=64, symmetric=False)
    assert not suits(12, 768, bits=4, group_size=64)  # rows of outputs that 16 bytes do not divide
    assert not suits(16, 192, bits=4, group_size=64) and not suits(16, 128, bits=4, group_size=64)
    assert not suits(16, 768, bits=8, group_size=64) and not suits(16, 768, format="nf", bits=4, group_size=64)


def test_a_launch_found_before_is_found_for_the_same_arguments_only() -> None:
    """Other alignments, numbers of tokens and types are other kernels."""
    packed = random_packed(64, 256, bits=4, group_size=64)
    matrix = triton.describe(moved(packed), torch.float16)
    assert matrix is not None
    buffer = torch.empty(packed.weight.numel() + 1, dtype=torch.int32, device=DEVICE)
    shifted = dataclasses.replace(moved(packed), weight=buffer[1:].view_as(packed.weight).copy_(packed.weight))
    other = triton.describe(shifted, torch.float16)
    assert other is not None
    for _ in range(2):
        for tokens in (1, 2, 1):
            x = inputs(tokens, 256, torch.float16)
            for one in (matrix, other):
                assert relative(triton.linear(x, one), x, packed) < TOLERANCE[torch.float16]
                assert torch.equal(
                    triton.decode_rows(one, slice(1, 4), torch.float16).cpu(), decode(packed).half()[1:4]
                )


@pytest.mark.parametrize("value", (float("nan"), float("inf")))
@pytest.mark.parametrize("name", ("int2", "int3", "int4", "int4-zero", "int6", "int8", "nf4"))
@pytest.mark.parametrize("tokens", (3, 12))
def test_a_token_that_is_not_finite_stays_so_alone(value: float, name: str, tokens: int) -> None:
    packed = random_packed(16, 256, group_size=64, scale_dtype="float16", **FORMATS[name])
    x = torch.ones(tokens, 256, dtype=torch.float16)
    x[1, 7] = value
    y = packed_linear(x.to(DEVICE), moved(packed), backend="triton").cpu()
    others = [index for index in range(tokens) if index != 1]
    touched = decode(packed)[:, 7] != 0
    assert not torch.isfinite(y[1][touched]).any() and torch.isfinite(y[others]).all()


def test_rows_by_index_and_ranges() -> None:
    packed = random_packed(50, 96, bits=3, group_size=32)
    matrix = triton.describe(moved(packed), torch.float32)
    assert matrix is not None
    index = torch.tensor([49, 0, 7, 7])
    assert torch.equal(triton.decode_rows(matrix, index.to(DEVICE), torch.float32).cpu(), decode(packed)[index])
    assert torch.equal(triton.decode_rows(matrix, slice(5, 19), torch.float32).cpu(), decode(packed)[5:19])


def test_strided_inputs_and_no_tokens() -> None:
    matrix = triton.describe(moved(random_packed(12, 64, bits=4)), torch.float16)
    assert matrix is not None
    wide = inputs(5, 129, torch.float16)
    for x in (wide[:, :64], wide[:, 1:65], wide.t()[:64].t()):
        assert torch.equal(triton.linear(x, matrix), triton.linear(x.contiguous().clone(), matrix))
    assert triton.linear(wide[:0, :64], matrix).shape == (0, 12)


@pytest.mark.parametrize("tokens", (1, 24, 200))
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("fields", ({"bits": 4, "group_size": 64}, {"bits": 8}, {"format": "float8_e4m3fn", "bits": 8}))
def test_every_route_agrees_with_the_reference_backend(
    tokens: int, activation: ActivationSpec | None, fields: dict[str, object]
) -> None:
    packed, x = moved(random_packed(96, 256, **fields)), inputs(tokens, 256).half()
    y, other = packed_linears(x, [packed, packed], activation, "triton")
    reference = packed_linear(x, packed, activation, "reference")
    assert torch.equal(y, other) and y.dtype == x.dtype
    assert (y.double() - reference.double()).norm() < 1e-3 * reference.double().norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", (4, 8))
def test_tokens_are_quantized_as_the_reference_does(bits: int, dtype: torch.dtype) -> None:
    x = torch.cat([inputs(7, 300, dtype) * 100, torch.zeros(1, 300, dtype=dtype, device=DEVICE)])
    activation = ActivationSpec("int", bits)
    codes, scale = triton.quantize_tokens(x, activation)
    expected = quantize_tokens(x.cpu(), activation)
    assert torch.equal(codes.cpu(), expected.codes) and torch.equal(scale.cpu(), expected.scale)
    x[2, 3] = float("nan")
    assert not torch.isfinite(triton.quantize_tokens(x, activation)[1][2]).any()


def test_gradients() -> None:
    packed = moved(random_packed(48, 128, bits=4, group_size=64))
    x = inputs(5, 128).requires_grad_()
    packed_linear(x, packed, backend="triton").sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, decode(packed).sum(0).expand_as(x), rtol=1e-4, atol=1e-4)


def test_what_reports_say() -> None:
    def kernel(activation: ActivationSpec | None = None, columns: int = 512, **fields: object) -> str:
        return kernel_of(moved(random_packed(8, columns, **fields)), activation, "triton")

    eight = ActivationSpec("int", 8)
    for bits in (1, 2, 3, 4, 6, 8):
        assert kernel(bits=bits, group_size=64) == "triton"
    assert kernel(bits=3, group_size=64, columns=576) == "triton"
    for bits in (5, 7):
        assert kernel(bits=bits, group_size=64) == "triton, decoded"
    assert kernel(bits=3, group_size=64, symmetric=False) == "triton, decoded"
    assert kernel(bits=3, group_size=64, scale_dtype="float32") == "triton, decoded"
    assert kernel(eight, bits=2, group_size=64) == kernel(eight, bits=3) == "triton"
    assert kernel(eight, bits=3, group_size=64) == "torch"
    assert kernel_of(moved(random_packed(8, 256, bits=4)), None, "reference") == "torch"
