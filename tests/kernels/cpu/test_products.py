"""Every native product against the torch reference, on every instruction set that runs here."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_lowbit.formats import ActivationSpec, PackedTensor, WeightSpec, decode, pack_codes
from hf_lowbit.formats.packed import to_bits
from hf_lowbit.kernels import cpu, packed_linear, packed_linears
from tests.kernels.cpu.matrices import FORMATS, random_packed

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}
GROUPS = (None, "tensor", 24, 32, 64, 96)
# (rows, columns): one row; columns that end within a block, a lane and a word; several panels of rows
SHAPES = ((1, 192), (33, 576), (7, 101), (113, 192))


def relative(y: torch.Tensor, expected: torch.Tensor, scale: torch.Tensor | None = None) -> float:
    """Norm of the difference over the norm of ``scale``, which is ``expected`` where nothing cancels."""
    scale = expected if scale is None else scale
    return float((y.double() - expected.double()).norm() / scale.double().norm())


def exact_product(x: torch.Tensor, packed: PackedTensor) -> torch.Tensor:
    return x.double() @ decode(packed).double().t()


def without_cancellation(x: torch.Tensor, packed: PackedTensor) -> torch.Tensor:
    """What rounding errors of a sum are proportional to: the product of magnitudes."""
    return x.double().abs() @ decode(packed).double().abs().t()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("group_size", GROUPS)
def test_equals_the_reference(name: str, group_size: int | str | None, instruction_set: str) -> None:
    for rows, columns in SHAPES:
        if isinstance(group_size, int) and columns % group_size:
            continue
        packed = random_packed(rows, columns, group_size=group_size, **FORMATS[name])
        matrix = cpu.describe(packed)
        assert matrix is not None
        for dtype, tolerance in TOLERANCE.items():
            assert torch.equal(cpu.decode_rows(matrix, slice(None), dtype), decode(packed, dtype))
            many = (16, 65, 130, 515) if cpu.multiplies_many(matrix, dtype) else ()
            for tokens in (1, 2, 3, 5, 8, 15, *many):
                x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(tokens))
                x = (x / 128).to(dtype)  # sums of e5m2 values must fit float16
                (y,) = cpu.linear(x, [matrix])
                assert y.dtype == dtype
                assert relative(y, exact_product(x, packed), without_cancellation(x, packed)) < tolerance


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("group_size", (None, 32, 64, 96))
def test_integer_sums_are_exact(name: str, group_size: int | None, instruction_set: str) -> None:
    packed = random_packed(65, 1088 if group_size is None else 576, group_size=group_size, **FORMATS[name])
    matrix = cpu.describe(packed)
    assert matrix is not None
    spec = packed.spec
    integers = not spec.has_fitted_table and spec.number_format.integer_multiplier is not None
    by_table = spec.bits <= 5 or (spec.bits < 8 and instruction_set not in ("avx2", "plain"))
    has_product = (by_table or spec.format == "int") and cpu.multiplies_in_registers(matrix)
    assert cpu.multiplies_int8(matrix) == (integers and has_product)
    if not cpu.multiplies_int8(matrix):
        return
    for tokens in (3, 6, 70, 150, 515):  # in one pass, in one of many, in several
        shape = (tokens, packed.columns)
        codes = torch.randint(-127, 128, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(1))
        scale = torch.rand(tokens, 1) + 0.5
        (y,) = cpu.linear_int8(codes, scale, [matrix], torch.float32)
        assert relative(y, exact_product(codes.double() * scale.double(), packed)) < 2e-6


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("group_size", (32, 64, 96, 144))
def test_inputs_with_the_groups_of_the_weight(name: str, group_size: int, instruction_set: str) -> None:
    """Each sum is scaled by both of its groups: inputs and weights of very different size, zero points too."""
    packed = random_packed(19, 576, group_size=group_size, **FORMATS[name])
    matrix = cpu.describe(packed)
    assert matrix is not None
    if not cpu.multiplies_int8(matrix):
        return
    groups = 576 // group_size
    for tokens in (1, 6, 70):
        codes = torch.randint(-127, 128, (tokens, 576), dtype=torch.int8, generator=torch.Generator().manual_seed(1))
        scale = torch.logspace(-2, 2, tokens * groups).reshape(tokens, groups)[:, torch.randperm(groups)]
        (y,) = cpu.linear_int8(codes, scale, [matrix], torch.float32)
        x = codes.double() * scale.double().repeat_interleave(group_size, 1)
        assert relative(y, exact_product(x, packed), without_cancellation(x, packed)) < 2e-6
    with pytest.raises(ValueError, match="refused"):
        cpu.linear_int8(codes, scale.repeat(1, 2), [matrix], torch.float32)


@pytest.mark.parametrize("name", ["int1", "int2-zero", "int3", "int4", "int5-zero", "int8", "int8-zero", "ternary"])
@pytest.mark.parametrize("group_size", [32, 128, None])
def test_a_few_inputs_give_what_each_gives_alone(name: str, group_size: int | None, instruction_set: str) -> None:
    """Rows and inputs that go together, ends of tiles and rows; several stretches of inputs at 33024 columns."""
    for rows, columns in ((37, 384), (18, 33024)):
        packed = random_packed(rows, columns, group_size=group_size, **FORMATS[name])
        matrix = cpu.describe(packed)
        assert matrix is not None and cpu.multiplies_int8(matrix)
        codes = torch.randint(-127, 128, (9, columns), dtype=torch.int8, generator=torch.Generator().manual_seed(3))
        scale = torch.logspace(-1, 1, 9).reshape(9, 1)
        (together,) = cpu.linear_int8(codes, scale, [matrix], torch.float32)
        x = codes.double() * scale.double()
        assert relative(together, exact_product(x, packed), without_cancellation(x, packed)) < 2e-6
        for i in range(9):
            (alone,) = cpu.linear_int8(codes[i : i + 1], scale[i : i + 1], [matrix], torch.float32)
            assert relative(alone, together[i : i + 1].double(), without_cancellation(x[i : i + 1], packed)) < 2e-6


@pytest.mark.parametrize(
    "name, group_size, expected",
    [("int4", 64, True), ("int4", 12, False), ("ternary-base3", None, True), ("ternary-base3", 64, False)],
)
def test_layouts_decoded_in_registers(name: str, group_size: int | None, expected: bool, instruction_set: str) -> None:
    matrix = cpu.describe(random_packed(4, 192, group_size=group_size, **FORMATS[name]))
    assert matrix is not None and cpu.multiplies_in_registers(matrix) == expected


def test_integer_products_run_where_promised(instruction_set: str) -> None:
    for bits in range(1, 9):
        matrix = cpu.describe(random_packed(4, 128, bits=bits, group_size=32))
        assert matrix is not None and cpu.multiplies_int8(matrix)
    matrix = cpu.describe(random_packed(4, 120, **FORMATS["ternary-base3"]))
    assert matrix is not None and cpu.multiplies_int8(matrix)


def test_integers_whose_sums_floats_cannot_hold_have_no_product(instruction_set: str) -> None:
    has_integers = instruction_set not in ("avx2", "plain")
    for columns, expected in ((14336, True), (33024, has_integers)):
        packed = random_packed(4, columns, bits=7)
        matrix = cpu.describe(packed)
        assert matrix is not None and cpu.multiplies_int8(matrix) == expected


@pytest.mark.parametrize("tokens", (1, 8, 20))
def test_threads_share_the_rows_of_several_matrices(tokens: int) -> None:
    """Enough codes for several runs of each, which end within a matrix and go on in the next."""
    sizes = ((1501, {"bits": 4}), (7, {"bits": 8}), (900, {"bits": 4}), (333, {"bits": 3}))
    several = [random_packed(rows, 576, group_size=64, **fields) for rows, fields in sizes]
    described = [matrix for packed in several if (matrix := cpu.describe(packed)) is not None]
    assert sum(packed.weight.numel() for packed in several) > 8 * 8192  # pieces; see rows.h
    x = torch.randn(tokens, 576, generator=torch.Generator().manual_seed(tokens)).bfloat16()
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        results = cpu.linear(x, described)
    finally:
        torch.set_num_threads(before)
    for y, packed in zip(results, several, strict=True):
        assert relative(y, exact_product(x, packed), without_cancellation(x, packed)) < TOLERANCE[torch.bfloat16]


@given(
    rows=st.integers(1, 70),
    columns=st.integers(1, 700),
    tokens=st.integers(1, 17),
    name=st.sampled_from(sorted(FORMATS)),
    threads=st.integers(1, 2),
    group=st.sampled_from([1, 2, 4, 8]),
)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_fuzzed_shapes(rows: int, columns: int, tokens: int, name: str, threads: int, group: int) -> None:
    group_size = columns // group if columns % group == 0 else None
    packed = random_packed(rows, columns, group_size=group_size, **FORMATS[name])
    matrix = cpu.describe(packed)
    assert matrix is not None
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(columns))
        (y,) = cpu.linear(x, [matrix])
        assert torch.equal(cpu.decode_rows(matrix, slice(None), torch.float32), decode(packed))
    finally:
        torch.set_num_threads(before)
    expected = exact_product(x, packed)
    bound = (x.double().abs() @ (decode(packed).double().abs()).t()) * 1e-5 + 1e-6
    if packed.zero_point is not None:  # the sums of the inputs are taken away after the product
        bound = bound + x.double().abs().sum(-1, keepdim=True) * 1e-3
    assert bool(((y.double() - expected).abs() <= bound).all())


@pytest.mark.parametrize("value", (float("nan"), float("inf")))
@pytest.mark.parametrize("name", ("int4", "int4-zero", "nf4", "float8_e4m3fn", "ternary-base3"))
def test_a_token_that_is_not_finite_stays_so_alone(value: float, name: str, instruction_set: str) -> None:
    packed = random_packed(16, 128, group_size=32, **FORMATS[name])
    x = torch.ones(3, 128)
    x[1, 7] = value
    matrix = cpu.describe(packed)
    assert matrix is not None
    (y,) = cpu.linear(x, [matrix])
    touched = decode(packed)[:, 7] != 0  # zero times infinity is left to IEEE, any value but zero is not finite
    assert not torch.isfinite(y[1][touched]).any()
    assert torch.isfinite(y[[0, 2]]).all()


@pytest.mark.parametrize("value", (float("inf"), -float("inf")))
@pytest.mark.parametrize("name", ("nf4", "nf3", "power5", "fitted3", "float8_e4m3fn"))
def test_infinite_inputs_keep_their_sign(value: float, name: str, instruction_set: str) -> None:
    """Also where a value is looked up as two, of which the second may be nothing."""
    packed = random_packed(64, 128, group_size=32, **FORMATS[name])
    x = torch.ones(1, 128, dtype=torch.bfloat16)
    x[0, 7] = value
    matrix = cpu.describe(packed)
    assert matrix is not None
    (y,) = cpu.linear(x, [matrix])
    weight = decode(packed)[:, 7]
    assert torch.equal(y[0][weight != 0].float(), weight[weight != 0] * value)


@pytest.mark.parametrize("name", ("nf4", "nf4-zero", "nf3", "power5", "fitted3", "int4", "float8_e4m3fn"))
@pytest.mark.parametrize("tokens", (1, 4))
def test_values_are_not_rounded_to_the_type_of_the_inputs(name: str, tokens: int, instruction_set: str) -> None:
    """What is left where products cancel shows it: bfloat16 values would be wrong by more than is allowed."""
    packed = random_packed(2000, 32, **FORMATS[name])
    x = torch.randn(tokens, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    matrix = cpu.describe(packed)
    assert matrix is not None
    (y,) = cpu.linear(x, [matrix])
    exact = exact_product(x, packed)
    allowed = 2**-8 * exact.abs() + 2**-15 * without_cancellation(x, packed)
    if packed.zero_point is not None:
        allowed = allowed + 2**-20 * x.double().abs().sum(-1, keepdim=True)
    assert bool(((y.double() - exact).abs() <= allowed).all())


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_every_byte_of_base_three_has_its_digits(dtype: torch.dtype, instruction_set: str) -> None:
    """A row of each byte times the unit vectors."""
    columns = 165  # a block, and a part of one
    digits = torch.arange(243)[:, None] // 3 ** torch.arange(5) % 3
    spec = WeightSpec(**FORMATS["ternary-base3"])
    codes = pack_codes(digits.repeat(1, columns // 5).to(torch.uint8), spec.bits, spec.packing)
    packed = PackedTensor(codes, to_bits(torch.ones(1, 1), spec.scale_dtype), spec, columns)
    matrix = cpu.describe(packed)
    assert matrix is not None
    (y,) = cpu.linear(torch.eye(columns, dtype=dtype), [matrix])
    assert torch.equal(y.t(), digits.repeat(1, columns // 5).to(dtype) - 1)


def test_several_matrices_in_one_call(instruction_set: str) -> None:
    weights = [
        random_packed(40, 256, bits=4, group_size=64),
        random_packed(24, 256, bits=8),
        random_packed(17, 256, bits=4, group_size=64, symmetric=False),
        random_packed(33, 256, format="nf", bits=4, group_size=64),
    ]
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(0))
    matrices = [cpu.describe(packed) for packed in weights]
    together = cpu.linear(x, [matrix for matrix in matrices if matrix is not None])
    for packed, matrix, y in zip(weights, matrices, together, strict=True):
        assert matrix is not None
        assert torch.equal(y, cpu.linear(x, [matrix])[0])
        assert relative(y, exact_product(x, packed)) < 2e-6


def test_strided_inputs_and_no_tokens() -> None:
    packed = random_packed(12, 64, bits=4)
    matrix = cpu.describe(packed)
    assert matrix is not None
    wide = torch.randn(5, 128, generator=torch.Generator().manual_seed(0))
    assert torch.equal(cpu.linear(wide[:, :64], [matrix])[0], cpu.linear(wide[:, :64].contiguous(), [matrix])[0])
    assert torch.equal(cpu.linear(wide.t()[:64].t(), [matrix])[0], cpu.linear(wide[:, :64].contiguous(), [matrix])[0])
    assert cpu.linear(wide[:0, :64], [matrix])[0].shape == (0, 12)


@pytest.mark.parametrize("tokens", (1, 16, 24, 25, 200))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize(
    "activation",
    (None, ActivationSpec("int", 8), ActivationSpec("int", 6, symmetric=False), ActivationSpec("float8_e4m3fn", 8)),
)
def test_every_route_agrees_with_the_reference_backend(
    tokens: int, dtype: torch.dtype, activation: ActivationSpec | None
) -> None:
    packed = random_packed(96, 256, bits=4, group_size=64)
    x = torch.randn(2, tokens, 256, generator=torch.Generator().manual_seed(0)).to(dtype)
    y = packed_linear(x, packed, activation)
    reference = packed_linear(x, packed, activation, "reference")
    assert y.shape == reference.shape and y.dtype == dtype
    assert relative(y, reference) < (2e-6 if dtype == torch.float32 else 5e-3)


def test_rows_by_index() -> None:
    packed = random_packed(50, 96, bits=3, group_size=32)
    matrix = cpu.describe(packed)
    assert matrix is not None
    index = torch.tensor([49, 0, 7, 7])
    assert torch.equal(cpu.decode_rows(matrix, index, torch.float32), decode(packed)[index])
    with pytest.raises(IndexError, match="50 rows"):
        cpu.decode_rows(matrix, torch.tensor([50]), torch.float32)
    with pytest.raises(IndexError, match="50 rows"):
        cpu.decode_rows(matrix, torch.tensor([-1]), torch.float32)


def test_quantized_inputs_with_weights_of_several_widths(instruction_set: str) -> None:
    weights = [
        random_packed(40, 256, bits=4, group_size=64),
        random_packed(24, 256, bits=8),
        random_packed(17, 256, bits=4, group_size=64, symmetric=False),
        random_packed(9, 256, format="nf", bits=4, group_size=64),  # no integers: another route
    ]
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(0))
    activation = ActivationSpec("int", 8)
    for packed, y in zip(weights, packed_linears(x, weights, activation), strict=True):
        assert relative(y, packed_linear(x, packed, activation, "reference")) < 2e-6
