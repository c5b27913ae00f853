"""Number formats: their tables are what the literature says, and encoding finds the nearest value."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_lowbit.formats import NumberFormat, format_names, get_format
from hf_lowbit.formats.number_format import default_bits

EXMY = [(e, m) for e in range(1, 8) for m in range(0, 8 - e)]
# bitsandbytes 0.45, functional.create_normal_map / get_4bit_type("nf4"): its literals.
BITSANDBYTES_NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
    0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
EVERY_FORMAT = [
    *[get_format("int", bits) for bits in range(1, 9)],
    *[get_format("nf", bits) for bits in (2, 3, 4)],
    *[get_format(f"fp_e{e}m{m}", 1 + e + m) for e, m in EXMY],
    get_format("float8_e4m3fn", 8),
    get_format("float8_e5m2", 8),
    get_format("ternary", 2),
    *[get_format("power", bits, a) for bits in (2, 3, 4, 8) for a in (0.5, 1.0, 1.2)],
    get_format("codebook", 2, None, (-1.0, -0.25, 0.5, 3.0)),
    get_format("codebook", 2, None, (0.5, 1.5, 2.5, 3.5)),
    get_format("codebook", 2, None, (-1.0, 0.0, 1.0, 2.0)),
]


def identify(number_format: NumberFormat) -> str:
    return f"{number_format.name}-{number_format.bits}"


every_format = pytest.mark.parametrize("number_format", EVERY_FORMAT, ids=identify)


def finite(table: Tensor) -> Tensor:
    return table[torch.isfinite(table)]


@pytest.mark.parametrize("bits", range(2, 9))
def test_integers_are_twos_complement(bits: int) -> None:
    assert get_format("int", bits).table.tolist() == list(range(-(2 ** (bits - 1)), 2 ** (bits - 1)))


def test_one_bit_is_minus_and_plus_one() -> None:
    assert get_format("int", 1).table.tolist() == [-1.0, 1.0]


def test_e2m1_has_the_values_of_ocp_fp4() -> None:
    positive = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    assert get_format("fp_e2m1", 4).table.tolist() == [*positive, *(-value for value in positive)]


def test_e3m2_and_e2m3_have_the_limits_of_ocp_fp6() -> None:
    assert get_format("fp_e3m2", 6).max_value == 28.0
    assert get_format("fp_e2m3", 6).max_value == 7.5


@pytest.mark.parametrize(("e", "m"), EXMY)
def test_exmy_is_finite_symmetric_and_monotone(e: int, m: int) -> None:
    table = get_format(f"fp_e{e}m{m}", 1 + e + m).table
    positive, negative = table.chunk(2)
    assert len(table) == 2 ** (1 + e + m)
    assert torch.isfinite(table).all()
    assert torch.equal(negative, -positive)
    assert (positive.diff() > 0).all() and positive[0] == 0
    assert positive[-1] == 2.0 ** (2**e - 1 - (2 ** (e - 1) - 1)) * (2 - 2.0**-m)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_encodes_as_torch_casts_bit_for_bit(dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    number_format = get_format(name, 8)
    values = finite(number_format.table).sort().values.unique()
    ties = (values[1:] + values[:-1]) / 2
    generator = torch.Generator().manual_seed(0)
    mantissa = torch.rand(20000, generator=generator) * 2 - 1
    spread = mantissa * torch.exp2(torch.randint(-20, 18, (20000,), generator=generator).float())
    around = [torch.nextafter(ties, torch.full_like(ties, limit)) for limit in (-math.inf, math.inf)]
    samples = torch.cat([values, ties, *around, spread])
    samples = samples[samples.abs() <= number_format.max_value]
    expected = (samples.to(dtype).float() + 0.0).to(dtype).view(torch.uint8)  # + 0.0 turns -0 into +0
    assert torch.equal(number_format.encode(samples), expected)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_saturates_and_never_writes_a_code_that_is_not_finite(dtype: torch.dtype) -> None:
    number_format = get_format(str(dtype).removeprefix("torch."), 8)
    decoded = number_format.decode(number_format.encode(torch.tensor([1e30, -1e30, math.inf, -math.inf])))
    largest = torch.finfo(dtype).max
    assert decoded.tolist() == [largest, -largest, largest, -largest]


def test_fp_e4m3fn_is_an_alias() -> None:
    assert get_format("fp_e4m3fn", 8).name == "float8_e4m3fn"


def test_nf4_has_the_literals_of_bitsandbytes() -> None:
    assert torch.equal(get_format("nf", 4).table, torch.tensor(BITSANDBYTES_NF4))


@pytest.mark.parametrize("bits", [2, 3])
def test_small_nf_has_a_zero_and_ends_at_one(bits: int) -> None:
    table = get_format("nf", bits).table
    assert (table.diff() > 0).all()
    assert table[0] == -1 and table[-1] == 1 and (table == 0).sum() == 1


def test_nf_construction_reproduces_the_nf4_literals() -> None:
    """The rule behind NF2 and NF3, at 4 bits, gives the published values."""
    from scipy.stats import norm

    positive = norm.ppf([0.9677083 + (0.5 - 0.9677083) * i / 8 for i in range(8)])
    assert torch.allclose(
        get_format("nf", 4).table[8:].flip(0).double(), torch.tensor(positive / positive[0]), atol=1e-6
    )


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_power_one_is_the_scaled_integer_grid(bits: int) -> None:
    qmax = 2 ** (bits - 1) - 1
    grid = get_format("int", bits).table.clamp(min=-qmax) / qmax
    assert torch.allclose(get_format("power", bits, 1.0).table, grid, atol=1e-7)


def test_power_one_half_is_squares() -> None:
    table = get_format("power", 4, 0.5).table
    assert torch.allclose(table[8:], (torch.arange(8) / 7) ** 2, atol=1e-7)
    assert torch.equal(table[9:], -table[1:8].flip(0))


def test_ternary_never_writes_its_fourth_code() -> None:
    ternary = get_format("ternary", 2)
    codes = ternary.encode(torch.linspace(-3, 3, 601))
    assert set(codes.tolist()) == {0, 1, 2}
    assert ternary.decode(torch.tensor([0, 1, 2])).tolist() == [-1, 0, 1]


@pytest.mark.parametrize(
    ("codebook", "message"),
    [
        ((0.0, 1.0, 2.0), "4 values, not 3"),
        ((0.0, 1.0, 1.0, 2.0), "distinct"),
        ((0.0, 2.0, 1.0, 3.0), "ascending"),
        ((0.0, 1.0, 2.0, math.inf), "finite"),
        ((0.0, math.nan, 2.0, 3.0), "finite"),
        (None, "stored with the weight"),
    ],
)
def test_impossible_codebooks_are_refused(codebook: tuple[float, ...] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_format("codebook", 2, None, codebook)


@pytest.mark.parametrize(
    ("name", "bits", "exponent", "message"),
    [
        ("float4", 4, None, "unknown number format 'float4'"),
        ("int", 9, None, "1 to 8"),
        ("int", 0, None, "1 to 8"),
        ("nf", 5, None, "2 to 4"),
        ("fp_e2m1", 5, None, "4 bits, not bits=5"),
        ("fp_e0m3", 4, None, "at least one exponent bit"),
        ("fp_e9m9", 19, None, "2..8 bits"),
        ("float8_e5m2", 4, None, "8 bits, not bits=4"),
        ("ternary", 3, None, "2 bits, not bits=3"),
        ("power", 4, None, "needs an exponent: give exponent=a"),
        ("power", 4, 4.5, "exponent <= 4"),
        ("power", 4, 0.0, "0 < exponent"),
        ("codebook", 9, None, "1 to 8"),
    ],
)
def test_unknown_names_and_widths_are_refused(name: str, bits: int, exponent: float | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_format(name, bits, exponent)


def test_an_unknown_name_is_answered_with_the_closest_or_all() -> None:
    with pytest.raises(ValueError, match="did you mean 'ternary'"):
        default_bits("ternery")
    with pytest.raises(ValueError) as refusal:
        default_bits("posit")
    assert all(name in str(refusal.value) for name in format_names())


@pytest.mark.parametrize(
    ("name", "codebook", "bits"),
    [("int", None, 4), ("nf", None, 4), ("ternary", None, 2), ("fp_e2m1", None, 4), ("fp_e3m2", None, 6),
     ("float8_e5m2", None, 8), ("fp_e4m3fn", None, 8), ("codebook", None, 4), ("codebook", (0, 1, 2, 3), 2)],
)  # fmt: skip
def test_a_format_implies_its_width(name: str, codebook: tuple[float, ...] | None, bits: int) -> None:
    assert default_bits(name, codebook) == bits


@every_format
def test_every_value_encodes_to_itself(number_format: NumberFormat) -> None:
    values = finite(number_format.table) + 0.0
    assert torch.equal(number_format.decode(number_format.encode(values)), values)


@every_format
@settings(deadline=None, derandomize=True, max_examples=15)
@given(seed=st.integers(0, 2**20))
def test_encoding_finds_the_nearest_value(number_format: NumberFormat, seed: int) -> None:
    values = finite(number_format.table).double()
    x = (torch.randn(200, generator=torch.Generator().manual_seed(seed)) * 0.6 * number_format.max_value).float()
    chosen = number_format.decode(number_format.encode(x)).double()
    best = (x.double().unsqueeze(1) - values).abs().amin(1)
    assert torch.equal((x.double() - chosen).abs(), best)


@every_format
def test_ties_go_to_the_even_code(number_format: NumberFormat) -> None:
    values = finite(number_format.table).double().unique()
    ties = ((values[1:] + values[:-1]) / 2).float()
    exact = (ties.double() - values[:-1]) == (values[1:] - ties.double())
    assert (number_format.encode(ties[exact]) % 2 == 0).all()


@every_format
def test_nearest_values_are_those_of_the_nearest_codes(number_format: NumberFormat) -> None:
    x = 2 * number_format.max_value * (torch.rand(500) - 0.5)
    assert torch.equal(number_format.nearest(x), number_format.decode(number_format.encode(x)))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_lloyd_max_levels_are_the_means_of_what_they_stand_for(bits: int) -> None:
    """The two conditions of Lloyd and Max, on a million normal numbers; 2 bits against the published 0.1175."""
    number_format = get_format("lloyd", bits)
    x = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0))
    scale = {2: 1.510, 3: 2.152, 4: 2.733}[bits]  # Max 1960, table I: the outermost level
    codes = number_format.encode(x / scale)
    means = torch.stack([x[codes == code].mean() for code in range(2**bits)])
    torch.testing.assert_close(means, number_format.table * scale, rtol=0, atol=0.012)
    error = (number_format.decode(codes) * scale - x).square().mean()
    assert abs(float(error) - {2: 0.1175, 3: 0.03454, 4: 0.009497}[bits]) < 2e-4


@pytest.mark.parametrize(
    ("name", "bits", "exponent", "multiplier"),
    [("int", 8, None, 1), ("int", 1, None, 1), ("ternary", 2, None, 1), ("fp_e2m1", 4, None, 2),
     ("fp_e3m0", 4, None, 4), ("fp_e2m3", 6, None, 8), ("nf", 4, None, None),
     ("power", 4, 0.5, 49), ("power", 3, 0.5, 9), ("power", 5, 0.5, None), ("power", 8, 1.0, 127),
     ("power", 4, 0.7, None), ("float8_e4m3fn", 8, None, None),
     ("fp_e4m3", 8, None, None)],
)  # fmt: skip
def test_integer_multiplier(name: str, bits: int, exponent: float | None, multiplier: int | None) -> None:
    assert get_format(name, bits, exponent).integer_multiplier == multiplier


@every_format
def test_integer_multiplier_makes_the_table_exact_int8(number_format: NumberFormat) -> None:
    multiplier = number_format.integer_multiplier
    if multiplier is not None:
        scaled = (number_format.table * multiplier).round()
        assert torch.equal(scaled.to(torch.int8).float(), scaled + 0.0)
        assert torch.equal(scaled / multiplier, number_format.table)
        assert multiplier == 1 or not torch.equal(scaled / 2, (scaled / 2).round())
    else:
        assert not torch.equal(number_format.table, number_format.table.round()) or number_format.max_value > 127
