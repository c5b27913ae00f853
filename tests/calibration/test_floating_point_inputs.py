"""Formats of static inputs: unsigned after softmax, shifted after SiLU and GELU, one split for all timesteps."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hf_lowbit.calibration.floating_point_inputs import search_split
from hf_lowbit.formats import ActivationSpec
from hf_lowbit.kernels.activation import quantize_tokens, restore_tokens


def histogram(*samples: Tensor) -> Any:
    """Of one sample, or of several, each a row of counts."""
    rounded = [sample.bfloat16().float().flatten() for sample in samples]
    values = torch.cat(rounded).unique()
    counts = torch.stack([torch.bincount(torch.searchsorted(values, x), minlength=len(values)) for x in rounded])
    return SimpleNamespace(values=values, counts=counts[0] if len(samples) == 1 else counts)


def gaussian(seed: int = 0, size: int = 20_000) -> Tensor:
    return 2 * torch.randn(size, generator=torch.Generator().manual_seed(seed))


def error(x: Tensor, spec: ActivationSpec, scale: Tensor, shift: Tensor | None) -> float:
    codes = quantize_tokens(x[:, None], spec, scale[None], None if shift is None else shift[None])
    return float((restore_tokens(*codes)[:, 0] - x).norm() / x.norm())


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_normal_inputs_are_signed_and_have_no_shift(bits: int) -> None:
    spec, scale, shift = search_split(histogram(gaussian()), ActivationSpec("fp", bits, static=True, shift=True))
    assert spec.format.startswith("fp_e2") and not spec.shift and shift is None
    assert scale.shape == () and error(gaussian(), spec, scale, shift) < {4: 0.12, 6: 0.03, 8: 0.008}[bits]


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("activate", [F.silu, F.gelu])
def test_after_silu_and_gelu_a_shift_saves_what_the_sign_would_cost(activate: Any, bits: int) -> None:
    x = activate(gaussian())
    plain = search_split(histogram(x), ActivationSpec("fp", bits, static=True))
    shifted = search_split(histogram(x), ActivationSpec("fp", bits, static=True, shift=True))
    assert not plain[0].shift and plain[2] is None
    assert shifted[0].shift and shifted[0].format.startswith("ufp")
    assert shifted[2] is not None and float(shifted[2]) == pytest.approx(float(x.min()), abs=2e-3)
    assert error(x, *shifted) < 0.7 * error(x, *plain)


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_after_softmax_there_is_no_sign(bits: int) -> None:
    x = gaussian().reshape(-1, 50).softmax(-1).flatten()
    spec, scale, shift = search_split(histogram(x), ActivationSpec("fp", bits, static=True))
    assert spec.format.startswith("ufp") and shift is None
    signed = search_split(histogram(x), ActivationSpec(f"fp_e3m{bits - 4}", bits, static=True))
    assert error(x, spec, scale, None) < 0.7 * error(x, *signed)


def test_a_few_negative_inputs_do_not_need_a_sign_and_more_do() -> None:
    x = gaussian().abs()
    x[0] = -0.1
    assert search_split(histogram(x), ActivationSpec("fp", 8, static=True))[0].format.startswith("ufp")
    x[:20] = -0.1
    assert search_split(histogram(x), ActivationSpec("fp", 8, static=True))[0].format.startswith("fp")


def test_a_layer_has_one_split_and_each_timestep_its_clip() -> None:
    steps = [gaussian(0), 10 * gaussian(1), 3 * gaussian(2)]
    asked = ActivationSpec("fp", 8, static=True, timesteps=(900, 500, 100))
    spec, scale, shift = search_split(histogram(*steps), asked)
    assert spec.format == "fp_e2m5" and shift is None and scale.shape == (3,)
    assert scale[1] / scale[0] == pytest.approx(10, rel=0.2) and scale[2] / scale[0] == pytest.approx(3, rel=0.2)
    assert all(error(x, spec, scale[i], None) < 0.01 for i, x in enumerate(steps))


def test_a_given_format_stays() -> None:
    spec, _, _ = search_split(histogram(gaussian()), ActivationSpec("fp_e5m2", 8, static=True))
    assert spec.format == "fp_e5m2"


def test_the_clip_is_the_best_of_the_grid() -> None:
    x = torch.distributions.StudentT(3.0).sample((20_000,)).clamp(-60, 60)
    spec, scale, _ = search_split(histogram(x), ActivationSpec("fp_e2m1", 4, static=True))
    assert spec.floating_point is not None
    scales = torch.linspace(0.1, 1.2, 111) * x.bfloat16().abs().max() / spec.limit
    errors = [error(x, spec, candidate, None) for candidate in scales]
    assert error(x, spec, scale, None) <= 1.001 * min(errors) and float(scale * spec.limit) < 0.6 * float(x.abs().max())


def test_idle_groups_have_a_scale_and_idle_layers_none() -> None:
    asked = ActivationSpec("fp", 8, group_size=32, static=True)
    _, scale, _ = search_split(histogram(gaussian(), torch.zeros(100)), asked)
    assert (scale > 0).all()
    assert not search_split(histogram(torch.zeros(100)), ActivationSpec("fp", 8, static=True))[1]
