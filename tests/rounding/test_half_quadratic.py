"""Half-quadratic rounding: the numbered tests of its method page, what it promises beside them, and its config."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_lowbit import ConfigError
from hf_lowbit.formats import PackedTensor, WeightSpec, decode, unpack_codes
from hf_lowbit.formats.packed import scales, zero_points
from hf_lowbit.rounding import RoundingError, half_quadratic, round_to_nearest
from hf_lowbit.rounding.grid import Grid, fit_grid
from hf_lowbit.rounding.half_quadratic import half_quadratic_round, next_zero_point, shrink
from hf_lowbit_hqq import METHOD, HQQConfig
from hf_lowbit_hqq.recipe import make_recipe

every_zero_point = pytest.mark.parametrize("real", [True, False], ids=["real", "integer"])
every_group = pytest.mark.parametrize("group_size", [None, "tensor", 16])


def weights(*shape: int, size: float = 0.02, seed: int = 0) -> Tensor:
    """Laplacian: usual tails, at the usual size of a model's weights."""
    uniform = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) - 0.5
    return -size * uniform.sign() * torch.log1p(-2 * uniform.abs())


def make_spec(bits: int, real: bool = True, group_size: Any = 16, **more: Any) -> WeightSpec:
    return WeightSpec("int", bits, group_size, symmetric=False, real_zero_point=real and bits > 1, **more)


def codes_of(packed: PackedTensor) -> Tensor:
    return unpack_codes(packed.weight, packed.spec.bits, packed.columns)


def group_errors(weight: Tensor, packed: PackedTensor) -> Tensor:
    """sum |w - w_hat| of each group."""
    error = (weight - decode(packed)).abs()
    return (
        error.sum() if packed.spec.group_size == "tensor" else error.unflatten(-1, (packed.scale.shape[-1], -1)).sum(-1)
    )


# 1
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@every_zero_point
@every_group
def test_no_group_becomes_worse_than_to_nearest(bits: int, real: bool, group_size: Any) -> None:
    weight, spec = weights(32, 48), make_spec(bits, real, group_size)
    before, after = (
        group_errors(weight, rounding(weight, spec)) for rounding in (round_to_nearest, half_quadratic_round)
    )
    assert (after <= before * (1 + 1e-5)).all()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_real_zero_points_make_most_groups_better(bits: int) -> None:
    weight, spec = weights(64, 256), make_spec(bits, group_size=64)
    before, after = (
        group_errors(weight, rounding(weight, spec)) for rounding in (round_to_nearest, half_quadratic_round)
    )
    assert after.sum() < 0.98 * before.sum()
    assert (after < before).float().mean() > 0.7


# 2
def test_beta_at_its_limits() -> None:
    """Infinite: the residual is all forgiven, the zero point stays. Zero: it moves by the mean residual, in codes."""
    grouped, spec = weights(6, 2, 16), make_spec(3, scale_dtype="float32")
    grid = fit_grid(grouped, spec, spec.number_format)
    values = grid.to_table_units(grouped).round().clamp(-4, 3)
    residual = grouped - (values - grid.zero_point.unsqueeze(-1)) * grid.scale.unsqueeze(-1)
    unmoved = next_zero_point(grouped, values, grid, 1e30, 0.7)
    assert torch.allclose(unmoved, grid.zero_point, atol=1e-5)
    moved = next_zero_point(grouped, values, grid, 1e-30, 0.7)
    assert torch.allclose(moved, grid.zero_point - residual.mean(-1) / grid.scale, atol=1e-5)
    assert (moved - grid.zero_point).abs().max() > 1e-3


# 3
def test_p_one_is_the_soft_threshold() -> None:
    x = torch.tensor([-2.0, -0.3, -0.1, 0.0, 0.1, 0.3, 2.0])
    assert torch.allclose(shrink(x, 5.0, 1.0), torch.tensor([-1.8, -0.1, 0.0, 0.0, 0.0, 0.1, 1.8]))


def test_shrinking_is_odd_keeps_zero_and_forgives_large_residuals_most() -> None:
    x = torch.linspace(-3, 3, 121)
    shrunk = shrink(x, 10.0, 0.7)
    assert torch.allclose(shrunk, -shrunk.flip(0), atol=1e-6) and shrunk[60] == 0
    assert (shrunk.abs() <= x.abs()).all() and (shrunk[x.abs() < 0.17] == 0).all()
    assert shrunk[-1] == pytest.approx(3 - 3**-0.3 / 10)


# 4
def test_an_outlier_costs_its_group_less() -> None:
    weight = weights(64, 64)
    weight[:, 0] = 1.0
    spec = make_spec(4, group_size=64)
    before, after = (
        (weight - decode(rounding(weight, spec)))[:, 1:].abs().median()
        for rounding in (round_to_nearest, half_quadratic_round)
    )
    assert after < 0.9 * before


# 5
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_codes_survive_packing_with_an_odd_number_of_groups(bits: int) -> None:
    """What is decoded is the nearest value of the stored grid for every weight: no code was lost or exchanged."""
    weight, spec = weights(5, 15 * 3), make_spec(bits, group_size=15)
    packed = half_quadratic_round(weight, spec)
    zero, scale = zero_points(packed), scales(packed)
    assert zero is not None
    units = weight.unflatten(1, (3, 15)) / scale.unsqueeze(-1) + zero.unsqueeze(-1)
    assert torch.equal(codes_of(packed), spec.number_format.encode(units).reshape(5, 45))


# 7
@every_group
def test_no_iterations_and_an_integer_zero_point_are_to_nearest(group_size: Any) -> None:
    weight, spec = weights(8, 48), make_spec(4, False, group_size)
    nearest, rounded = round_to_nearest(weight, spec), half_quadratic_round(weight, spec, iterations=0)
    assert all(torch.equal(tensor, rounded.tensors()[suffix]) for suffix, tensor in nearest.tensors().items())


# 8
@pytest.mark.parametrize("search_scale", [False, True])
def test_doubled_weights_have_doubled_scales_and_the_same_codes(search_scale: bool) -> None:
    """For weights of usual size, whose residuals all lie below the threshold that beta sets in their units."""
    weight = weights(8, 64)
    one, two = (half_quadratic_round(weight * f, make_spec(4), search_scale=search_scale) for f in (1, 2))
    assert torch.equal(codes_of(one), codes_of(two))
    assert torch.equal(scales(one) * 2, scales(two))


@pytest.mark.parametrize("bits", [2, 3])
def test_searching_the_scale_helps_few_bits(bits: int) -> None:
    weight, spec = weights(32, 128), make_spec(bits, group_size=64)
    plain, searched = (group_errors(weight, half_quadratic_round(weight, spec, search_scale=s)) for s in (False, True))
    assert (searched <= plain * (1 + 1e-5)).all()
    assert searched.sum() < 0.9 * plain.sum()


def test_the_scale_stays() -> None:
    weight, spec = weights(8, 64), make_spec(3)
    assert torch.equal(half_quadratic_round(weight, spec).scale, round_to_nearest(weight, spec).scale)


@every_zero_point
@pytest.mark.parametrize("size", [0.02, 1.0])
def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch, real: bool, size: float) -> None:
    weight, spec = weights(13, 48, size=size), make_spec(3, real)
    whole = half_quadratic_round(weight, spec)
    monkeypatch.setattr(half_quadratic, "_CHUNK_ELEMENTS", 100)
    chunked = half_quadratic_round(weight, spec)
    assert all(torch.equal(tensor, chunked.tensors()[suffix]) for suffix, tensor in whole.tensors().items())


@every_zero_point
@every_group
def test_experts_are_rounded_each_on_its_own(real: bool, group_size: Any) -> None:
    weight, spec = weights(3, 6, 48), make_spec(3, real, group_size)
    packed = half_quadratic_round(weight, spec)
    shapes = {suffix: (tuple(tensor.shape), tensor.dtype) for suffix, tensor in packed.tensors().items()}
    assert shapes == spec.companions((3, 6), 48)
    for index in range(3):
        assert torch.equal(decode(packed[index]), decode(half_quadratic_round(weight[index], spec)))


@every_group
@pytest.mark.parametrize("constant", [0.0, 0.75, -0.75])
def test_a_constant_weight_stays_close(constant: float, group_size: Any) -> None:
    weight = torch.full((4, 32), constant)
    decoded = decode(half_quadratic_round(weight, make_spec(4, group_size=group_size), search_scale=True))
    assert torch.allclose(decoded, weight, rtol=2**-7)


@pytest.mark.parametrize("spec", [WeightSpec("int", 4), WeightSpec("nf", 4, symmetric=False)])
def test_other_specs_are_refused(spec: WeightSpec) -> None:
    with pytest.raises(RoundingError, match="needs format 'int' and symmetric=False"):
        half_quadratic_round(weights(4, 32), spec)


def test_weights_that_are_not_finite_are_refused() -> None:
    weight = weights(4, 32)
    weight[2, 5] = float("nan")
    with pytest.raises(RoundingError, match="NaN or infinite"):
        half_quadratic_round(weight, make_spec(4))


def test_a_zero_point_beyond_its_stored_type_is_not_taken() -> None:
    """A step may leave float16's range; what is kept was read back from storage."""
    grouped, spec = weights(2, 1, 16), make_spec(4, scale_dtype="float16")
    stored = half_quadratic._as_stored(torch.tensor([[1e6]]), spec, spec.number_format)
    grid = Grid(torch.tensor([[1.0]]), stored)
    assert not (half_quadratic._error(grouped, grouped, grid) < 1).any()


# the plugin
def test_the_config_round_trips_and_has_the_authors_defaults() -> None:
    config = HQQConfig(bits=3, iterations=5, p=1, beta=1.0, overrides={"q_proj": {"bits": 8}})
    assert HQQConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert HQQConfig().layer_spec("x").weight == WeightSpec("int", 4, 64, False, real_zero_point=True)
    assert (HQQConfig().iterations, HQQConfig().p, HQQConfig().beta, HQQConfig().kappa) == (20, 0.7, 10.0, 1.01)
    assert METHOD.config_class is HQQConfig and not METHOD.needs_data


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"symmetric": True}, "symmetric must be False: HQQ optimises zero points"),
        ({"format": "nf"}, "format must be 'int'"),
        ({"iterations": -1}, "iterations must be an integer >= 0"),
        ({"iterations": 2.0}, "iterations must be an integer >= 0"),
        ({"p": 0}, "p must lie above 0"),
        ({"p": 1.5}, "p must lie above 0"),
        ({"p": True}, "p must lie above 0"),
        ({"beta": 0}, "beta must be a number above 0"),
        ({"beta": "big"}, "beta must be a number above 0"),
        ({"beta": float("inf")}, "beta must be a number above 0"),
        ({"kappa": 0.5}, "kappa must be a number of at least 1"),
        ({"search_scale": 1}, "search_scale must be True or False"),
        ({"steps": 3}, "no field steps"),
        ({"overrides": {"x": {"iterations": 3}}}, "cannot set iterations"),
    ],
)
def test_impossible_configs_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        HQQConfig(**values)


@pytest.mark.parametrize("bits", range(1, 9))
def test_the_recipe_serves_every_width(bits: int) -> None:
    weight, config = weights(8, 64), HQQConfig(bits=bits)
    spec = config.layer_spec("x").weight
    packed = make_recipe(config).rounding(weight, spec)
    assert packed.spec == spec and not spec.has_integer_zero_point
    assert torch.equal(decode(packed), decode(half_quadratic_round(weight, spec)))


@pytest.mark.parametrize("override", [{"format": "nf"}, {"symmetric": True}, {"format": "ternary", "symmetric": True}])
def test_layers_of_another_format_are_rounded_to_nearest(override: dict[str, Any]) -> None:
    weight, config = weights(8, 64), HQQConfig(overrides={"lm_head": override})
    spec = config.layer_spec("lm_head").weight
    packed = make_recipe(config).rounding(weight, spec)
    assert packed.spec == spec
    assert torch.equal(decode(packed), decode(round_to_nearest(weight, spec)))


def test_the_recipe_passes_its_fields_on() -> None:
    weight = weights(8, 64, size=1.0)
    config = HQQConfig(bits=3, iterations=7, p=0.9, beta=3.0, kappa=1.2, search_scale=True)
    spec = replace(config.layer_spec("x").weight, group_size=16)
    expected = half_quadratic_round(weight, spec, iterations=7, p=0.9, beta=3.0, kappa=1.2, search_scale=True)
    assert torch.equal(decode(make_recipe(config).rounding(weight, spec)), decode(expected))
    assert not torch.equal(decode(make_recipe(HQQConfig()).rounding(weight, spec)), decode(expected))
