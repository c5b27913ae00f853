"""GPTQ: the numbered tests of its method page, against a plain transcription of its steps and against LDLQ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from hf_lowbit.formats import NumberFormat, PackedTensor, WeightSpec, decode, unpack_codes
from hf_lowbit.formats.packed import scales, table_of, zero_points
from hf_lowbit.rounding import RoundingError, round_to_nearest
from hf_lowbit.rounding.clip import fit_clipped, fit_range
from hf_lowbit.rounding.gptq import CholeskyError, gptq
from hf_lowbit.rounding.grid import Grid
from hf_lowbit.rounding.store import format_for

ASSETS = Path(__file__).parents[1] / "assets"
ROWS, COLUMNS = 16, 64
FORMATS: dict[str, dict[str, Any]] = {
    **{f"int{bits}": {"bits": bits} for bits in (1, 2, 3, 4, 8)},
    **{f"int{bits}-zero": {"bits": bits, "symmetric": False} for bits in (1, 2, 3, 4, 8)},
    "int4-real-zero": {"bits": 4, "symmetric": False, "real_zero_point": True},
    "nf3": {"format": "nf", "bits": 3},
    "nf4": {"format": "nf", "bits": 4},
    "nf4-zero": {"format": "nf", "bits": 4, "symmetric": False},
    "fp_e2m1": {"format": "fp_e2m1", "bits": 4},
    "float8_e4m3fn": {"format": "float8_e4m3fn", "bits": 8},
    "power": {"format": "power", "bits": 4, "exponent": 0.5},
    "ternary": {"format": "ternary", "bits": 2},
    "ternary-base3": {"format": "ternary", "bits": 2, "packing": "base3"},
    "codebook": {"format": "codebook", "bits": 2, "codebook": (-1.0, -0.2, 0.3, 1.0)},
    "fitted": {"format": "codebook", "bits": 3},
    "fitted-zero": {"format": "codebook", "bits": 3, "symmetric": False},
}
every_format = pytest.mark.parametrize("values", FORMATS.values(), ids=FORMATS)
every_group = pytest.mark.parametrize("group_size", [None, "tensor", 16])
THREE_BITS = WeightSpec(bits=3, group_size=16)


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def correlated(seed: int = 0, columns: int = COLUMNS, tokens: int = 256) -> Tensor:
    """Mean x x^T of random inputs, mixed so that channels correlate and differ in size."""
    x = gaussian(tokens, columns, seed=seed) @ gaussian(columns, columns, seed=seed + 1000)
    x = x * torch.logspace(0, -1, columns, dtype=x.dtype)[torch.randperm(columns, generator=seeded(seed))]
    return x.t() @ x / tokens


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def damped(h: Tensor, damping: float = 0.01) -> Tensor:
    return h + damping * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)


def proxy(weight: Tensor, packed: PackedTensor, h: Tensor) -> float:
    """tr((W - Q) H (W - Q)^T)."""
    error = weight.double() - decode(packed).double()
    return ((error @ h.double()) * error).sum().item()


def codes_of(packed: PackedTensor) -> Tensor:
    return unpack_codes(packed.weight, packed.spec.bits, packed.columns, packed.spec.packing)


def same(first: PackedTensor, second: PackedTensor) -> bool:
    return all(torch.equal(tensor, second.tensors()[suffix]) for suffix, tensor in first.tensors().items())


def format_of(packed: PackedTensor) -> NumberFormat:
    spec = packed.spec
    return NumberFormat("codebook", spec.bits, table_of(packed)) if spec.has_fitted_table else spec.number_format


def per_column(packed: PackedTensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point of every weight, float64 ``[rows or 1, columns]``."""
    scale, zero = scales(packed), zero_points(packed)
    zero = torch.zeros_like(scale) if zero is None else zero
    repeats = packed.columns // scale.shape[1]
    return scale.repeat_interleave(repeats, 1).double(), zero.repeat_interleave(repeats, 1).double()


def round_column(w: Tensor, scale: Tensor, zero: Tensor, number_format: NumberFormat) -> Tensor:
    codes = number_format.encode(w / torch.where(scale == 0, 1.0, scale) + zero)
    return (number_format.decode(codes).double() - zero) * scale


def transcribed(weight: Tensor, spec: WeightSpec, h: Tensor, *, refit: bool = False) -> Tensor:
    """The page's steps, one column at a time without blocks; with ``refit`` each group on the working copy."""
    number_format, _ = format_for(weight, spec)
    start = round_to_nearest(weight, spec)
    scale, zero = (part.expand(len(weight), -1).clone() for part in per_column(start))
    upper = torch.linalg.cholesky(torch.linalg.inv(damped(h)), upper=True)
    work, rounded = weight.clone(), torch.zeros_like(weight)
    size = weight.shape[1] // spec.groups(weight.shape[1])
    for i in range(weight.shape[1]):
        if refit and i % size == 0:
            grid = fit_range(work[:, i : i + size].float().unsqueeze(1), spec, number_format)
            scale[:, i : i + size], zero[:, i : i + size] = (part.double().expand(-1, size) for part in grid)
        rounded[:, i] = round_column(work[:, i], scale[:, i], zero[:, i], number_format)
        error = (work[:, i] - rounded[:, i]) / upper[i, i]
        work[:, i:] -= error.outer(upper[i, i:])
    return rounded


# 1
@every_format
def test_less_error_than_rounding_to_nearest(values: dict[str, Any]) -> None:
    """On the same grid, on average over correlated inputs; never a promise for one of them."""
    spec = WeightSpec(group_size=16, **values)
    ratios = []
    for seed in range(20):
        weight, h = gaussian(ROWS, COLUMNS, seed=seed), correlated(seed)
        result, nearest = gptq(weight, spec, h), round_to_nearest(weight, spec)
        assert torch.equal(result.packed.scale, nearest.scale)
        ratios.append(proxy(weight, result.packed, h) / proxy(weight, nearest, h))
    assert sum(ratios) / len(ratios) < 0.9


@pytest.mark.parametrize("values", [v for k, v in FORMATS.items() if k in ("int3", "int4-zero", "nf4", "ternary")])
def test_less_error_than_rounding_to_nearest_on_real_layers(values: dict[str, Any]) -> None:
    """The first projection of a small trained model, and the normalised embeddings that it reads."""
    with safe_open(ASSETS / "mamba-debian" / "model.safetensors", "pt") as file:
        embeddings, norm, weight = (
            file.get_tensor(f"backbone.{name}.weight").float()
            for name in ("embeddings", "layers.0.norm", "layers.0.mixer.in_proj")
        )
    x = torch.nn.functional.rms_norm(embeddings, norm.shape, norm, 1e-5)
    h, spec = x.t() @ x / len(x), WeightSpec(group_size=64, **values)
    nearest = proxy(weight, round_to_nearest(weight, spec), h)
    assert proxy(weight, gptq(weight, spec, h).packed, h) < 0.9 * nearest
    assert proxy(weight, gptq(weight, spec, h, act_order=True).packed, h) < 0.9 * nearest


# 2
@every_format
@every_group
@pytest.mark.parametrize("act_order", [False, True])
def test_inputs_without_correlation_leave_rounding_to_nearest(
    values: dict[str, Any], group_size: Any, act_order: bool
) -> None:
    spec = WeightSpec(group_size=group_size, **values)
    weight = gaussian(ROWS, COLUMNS, dtype=torch.float32).bfloat16()  # many exact ties
    assert same(gptq(weight, spec, 3 * torch.eye(COLUMNS), act_order=act_order).packed, round_to_nearest(weight, spec))


# 3
@every_group
@pytest.mark.parametrize("values", [FORMATS["int3"], FORMATS["int4-zero"], FORMATS["nf4"]], ids=["int", "zero", "nf"])
@pytest.mark.parametrize("options", [{}, {"act_order": True}, {"static_groups": False}], ids=["", "order", "dynamic"])
def test_the_block_size_changes_nothing(group_size: Any, values: dict[str, Any], options: dict[str, Any]) -> None:
    weight, h, spec = gaussian(ROWS, COLUMNS), correlated(), WeightSpec(group_size=group_size, **values)
    first, *others = (gptq(weight, spec, h, block_size=size, **options) for size in (1, 5, 16, 24, 32, COLUMNS, 128))
    for other in others:
        assert same(first.packed, other.packed)
        assert other.loss == pytest.approx(first.loss, rel=1e-9)


# 4
@every_format
@pytest.mark.parametrize("options", [{}, {"act_order": True}, {"static_groups": False}], ids=["", "order", "dynamic"])
def test_the_loss_is_the_error_of_the_output(values: dict[str, Any], options: dict[str, Any]) -> None:
    weight, h = gaussian(ROWS, COLUMNS), correlated()
    result = gptq(weight, WeightSpec(group_size=16, **values), h, **options)
    assert result.loss == pytest.approx(proxy(weight, result.packed, damped(h)), rel=1e-5)


# 5
@every_format
@every_group
@pytest.mark.parametrize("static_groups", [True, False])
def test_the_result_lies_on_its_grid(values: dict[str, Any], group_size: Any, static_groups: bool) -> None:
    packed = gptq(
        gaussian(ROWS, COLUMNS), WeightSpec(group_size=group_size, **values), correlated(), static_groups=static_groups
    ).packed
    number_format, (scale, zero) = format_of(packed), per_column(packed)
    again = number_format.encode(decode(packed).double() / scale + zero)
    assert torch.equal(number_format.decode(again), number_format.decode(codes_of(packed)))
    assert len(codes_of(packed).unique()) > 1


# 6
def test_equal_powers_are_visited_in_the_stored_order() -> None:
    h = correlated()
    size = h.diagonal().sqrt()
    h = h / size.outer(size)
    h.diagonal().fill_(1.0)
    weight = gaussian(ROWS, COLUMNS)
    assert same(gptq(weight, THREE_BITS, h).packed, gptq(weight, THREE_BITS, h, act_order=True).packed)


# 7
@every_group
@every_format
def test_equality_with_ldlq(values: dict[str, Any], group_size: Any) -> None:
    """QuIP's form (arXiv 2307.13304): each column is rounded with linear feedback from the errors of those before.

    The coefficients of column k are H_<k,k.. (H_k..,k..)^-1 e_1, those of the unit upper U in H = U D U^T.
    """
    weight, h, spec = gaussian(ROWS, COLUMNS), correlated(), WeightSpec(group_size=group_size, **values)
    packed = gptq(weight, spec, h).packed
    number_format, (scale, zero) = format_of(packed), per_column(packed)
    h, rounded = damped(h), torch.zeros_like(weight)
    for k in range(COLUMNS):
        feedback = torch.linalg.solve(h[k:, k:], h[k:, :k])[0]
        wanted = weight[:, k] + (weight[:, :k] - rounded[:, :k]) @ feedback
        rounded[:, k] = round_column(wanted, scale[:, k], zero[:, k], number_format)
    torch.testing.assert_close(decode(packed).double(), rounded, rtol=1e-5, atol=1e-6)


@every_format
@pytest.mark.parametrize("refit", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("block_size", [8, 48, 128])
def test_equality_with_the_steps_of_the_page(values: dict[str, Any], refit: bool, block_size: int) -> None:
    """Groups fitted on the way see the errors of all columns before them, in smaller blocks and in larger ones."""
    weight, h, spec = gaussian(ROWS, COLUMNS), correlated(), WeightSpec(group_size=16, **values)
    packed = gptq(weight, spec, h, static_groups=not refit, block_size=block_size).packed
    torch.testing.assert_close(decode(packed).double(), transcribed(weight, spec, h, refit=refit), rtol=1e-5, atol=1e-6)


# 8
@pytest.mark.parametrize("factor", [1e-6, 2.0, 1e5])
@pytest.mark.parametrize("dead", [[], [3, 17]])
def test_the_scale_of_the_hessian_does_not_matter(factor: float, dead: list[int]) -> None:
    """Nor when some inputs are always zero."""
    weight, h = gaussian(ROWS, COLUMNS), correlated()
    h[dead], h[:, dead] = 0, 0
    for options in ({}, {"act_order": True}, {"grid_fit": fit_clipped}):
        assert same(
            gptq(weight, THREE_BITS, h, **options).packed, gptq(weight, THREE_BITS, h * factor, **options).packed
        )


# 9
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("values", [v for k, v in FORMATS.items() if k in ("int4", "int3-zero", "nf4", "ternary")])
def test_columns_without_input_become_zero(values: dict[str, Any], act_order: bool) -> None:
    """And leave no trace: their weights, however large, neither stretch a grid nor move another column."""
    weight, h, dead = gaussian(ROWS, COLUMNS), correlated(), torch.arange(2, COLUMNS, 7)
    h[dead], h[:, dead] = 0, 0
    spec = WeightSpec(group_size=16, **values)
    large, none = weight.clone(), weight.clone()
    large[:, dead], none[:, dead] = 1e4, 0
    packed = gptq(large, spec, h, act_order=act_order).packed
    assert (decode(packed)[:, dead] == 0).all()
    assert same(packed, gptq(none, spec, h, act_order=act_order).packed)


def test_a_layer_without_any_input_is_all_zero() -> None:
    result = gptq(gaussian(ROWS, COLUMNS), THREE_BITS, torch.zeros(COLUMNS, COLUMNS))
    assert (decode(result.packed) == 0).all() and result.loss == 0


# order and groups
def test_the_order_of_powers_is_that_of_permuted_columns() -> None:
    """Codes and groups stay where their columns are: the same as permuting by hand, with one grid per row."""
    weight, h, spec = gaussian(ROWS, COLUMNS), correlated(), WeightSpec(bits=3)
    order = torch.argsort(h.diagonal(), descending=True)
    by_hand = gptq(weight[:, order], spec, h[order][:, order]).packed
    assert torch.equal(decode(gptq(weight, spec, h, act_order=True).packed)[:, order], decode(by_hand))
    assert not torch.equal(order, torch.arange(COLUMNS))


@every_format
def test_the_order_of_powers_helps_and_keeps_the_grids(values: dict[str, Any]) -> None:
    spec = WeightSpec(group_size=16, **values)
    ratios = []
    for seed in range(6):
        weight, h = gaussian(ROWS, COLUMNS, seed=seed), correlated(seed)
        result, nearest = gptq(weight, spec, h, act_order=True), round_to_nearest(weight, spec)
        assert torch.equal(result.packed.scale, nearest.scale)
        ratios.append(proxy(weight, result.packed, h) / proxy(weight, nearest, h))
    assert sum(ratios) / len(ratios) < 0.9


def test_order_needs_grids_that_are_known() -> None:
    with pytest.raises(ValueError, match="act_order needs static_groups=True"):
        gptq(gaussian(ROWS, COLUMNS), THREE_BITS, correlated(), act_order=True, static_groups=False)


def test_grids_fitted_on_the_way_follow_the_weights() -> None:
    weight, h = gaussian(ROWS, COLUMNS), correlated()
    static, dynamic = (gptq(weight, THREE_BITS, h, static_groups=static).packed for static in (True, False))
    first_group = scales(static)[:, 0]
    assert torch.equal(scales(dynamic)[:, 0], first_group)
    assert not torch.equal(scales(dynamic)[:, 1:], scales(static)[:, 1:])


@every_group
@pytest.mark.parametrize("static_groups", [True, False])
def test_searched_ranges_see_the_power_of_their_columns(group_size: Any, static_groups: bool) -> None:
    spec, h, seen = WeightSpec(bits=3, group_size=group_size), correlated(), []

    def fit(grouped: Tensor, spec: WeightSpec, number_format: NumberFormat, importance: Tensor | None = None) -> Grid:
        assert importance is not None
        seen.append(importance)
        return fit_clipped(grouped, spec, number_format, importance)

    gptq(gaussian(ROWS, COLUMNS), spec, h, grid_fit=fit, static_groups=static_groups)
    assert torch.equal(torch.cat(seen).flatten(), h.diagonal().float())


def test_searched_ranges_help() -> None:
    ratios = []
    for seed in range(10):
        weight, h = gaussian(ROWS, 128, seed=seed), correlated(seed, columns=128)
        spec = WeightSpec(bits=3, symmetric=False)
        ratios.append(gptq(weight, spec, h, grid_fit=fit_clipped).loss / gptq(weight, spec, h).loss)
    assert sum(ratios) / len(ratios) < 0.9


# precision
def test_other_types_round_as_their_float32_values() -> None:
    weight, h = gaussian(ROWS, COLUMNS, dtype=torch.float32).bfloat16(), correlated().float()
    assert same(gptq(weight, THREE_BITS, h).packed, gptq(weight.float(), THREE_BITS, h).packed)


def test_float32_is_as_good_as_float64() -> None:
    weight, h = gaussian(ROWS, 192), correlated(columns=192, tokens=4096)
    single, double = gptq(weight.float(), THREE_BITS, h.float()), gptq(weight, THREE_BITS, h)
    assert single.loss == pytest.approx(double.loss, rel=0.02)
    assert (codes_of(single.packed) == codes_of(double.packed)).float().mean() > 0.98


def test_arguments_are_left_alone() -> None:
    weight, h = gaussian(ROWS, COLUMNS), correlated()
    h[5], h[:, 5] = 0, 0
    before = weight.clone(), h.clone()
    gptq(weight, THREE_BITS, h)
    assert torch.equal(weight, before[0]) and torch.equal(h, before[1])


# failures
def test_what_float32_cannot_factorise_float64_can() -> None:
    """Few tokens and next to no damping: float32 loses the smallest eigenvalues, but no more damping is needed."""
    x, weight, tiny = gaussian(8, COLUMNS), gaussian(ROWS, COLUMNS).float(), 1e-8
    h = x.t() @ x / 8
    _, failed = torch.linalg.cholesky_ex(damped(h, tiny).float().flip(0, 1))
    assert failed
    assert gptq(weight, THREE_BITS, h, damping=tiny).damping == tiny
    assert gptq(weight, THREE_BITS, h.float(), damping=tiny).damping > tiny  # it was lost before


def test_damping_grows_until_the_hessian_is_positive_definite() -> None:
    h = torch.eye(COLUMNS) + 0.0
    h[0, 1] = h[1, 0] = 1.05  # an eigenvalue of -0.05
    result = gptq(gaussian(ROWS, COLUMNS), THREE_BITS, h, damping=0.01)
    assert result.damping == pytest.approx(0.1)
    assert gptq(gaussian(ROWS, COLUMNS), THREE_BITS, h, damping=0).damping == pytest.approx(0.1)


def test_a_hessian_beyond_damping_is_refused() -> None:
    h = torch.eye(COLUMNS)
    h[0, 1] = h[1, 0] = 10.0
    with pytest.raises(CholeskyError, match="not positive definite even with damping=1"):
        gptq(gaussian(ROWS, COLUMNS), THREE_BITS, h)
    assert issubclass(CholeskyError, RoundingError) and issubclass(RoundingError, ValueError)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    weight, h = gaussian(ROWS, COLUMNS), correlated()
    broken = h.clone()
    broken[3, 3] = bad
    with pytest.raises(RoundingError, match="Hessian holds NaN"):
        gptq(weight, THREE_BITS, broken)
    h[5], h[:, 5] = 0, 0
    weight[2, 5] = bad  # also where no input meets it
    with pytest.raises(RoundingError, match="weight holds NaN"):
        gptq(weight, THREE_BITS, h)


def test_a_hessian_of_another_width_is_refused() -> None:
    with pytest.raises(RoundingError, match="64 columns has no Hessian of"):
        gptq(gaussian(ROWS, COLUMNS), THREE_BITS, correlated(columns=32))


def test_the_group_must_divide_the_columns() -> None:
    with pytest.raises(ValueError, match="does not divide"):
        gptq(gaussian(ROWS, 60), THREE_BITS, correlated(columns=60))
