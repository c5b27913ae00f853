"""Static inputs per timestep and group: what data of a diffusion model gives each of them, and who may fit them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hf_lowbit
from hf_lowbit.calibration.static_inputs import UNKNOWN_RANGE, InputHistogram
from hf_lowbit.calibration.walk import Walk
from hf_lowbit.formats import ActivationSpec
from hf_lowbit.plan import ModelFacts, PlanError, build_plan, packed_modules
from hf_lowbit.tensorwise import pack_parameter
from tests.calibration.processes import run_in_two


def config(**fields: Any) -> Any:
    return hf_lowbit.RTNConfig(**{"bits": 8, "activation_bits": 8, "activation_static": True, **fields})


class Denoiser(nn.Module):
    """Layers whose input grows as the timestep falls; one of two groups of channels is a hundred times the other."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.out, self.idle = nn.Conv2d(4, 16, 3, padding=1), nn.Linear(16, 8), nn.Linear(4, 4)

    def forward(self, sample: Tensor, timestep: Tensor | None = None) -> Tensor:
        assert timestep is not None
        x = torch.nn.functional.silu(self.conv(sample)).flatten(2).transpose(1, 2)
        x = x * torch.where(torch.arange(16) < 8, 1.0, 100.0)
        y: Tensor = self.out(x * (1000 - timestep).view(-1, 1, 1)) + self.idle(0 * x[..., :4]).sum()
        return y


def denoising(timesteps: tuple[int, ...] = (900, 500, 100), samples: int = 2) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {"sample": torch.randn(samples, 4, 5, 5, generator=generator), "timestep": torch.full((samples,), timestep)}
        for timestep in timesteps
        for _ in range(2)
    ]


def denoiser(data: list[dict[str, Any]] | None = None, **fields: Any) -> Denoiser:
    data = denoising() if data is None else data
    samples = sum(len(batch["sample"]) for batch in data)
    values = {"activation_timesteps": True, "group_size": None, "num_samples": samples, "dataset": data, **fields}
    model: Denoiser = hf_lowbit.quantize(Denoiser(), config(**values))
    return model


def inputs_at(timestep: int, data: list[dict[str, Any]]) -> Tensor:
    """What the last layer of the float model reads."""
    model, seen = Denoiser(), []
    model.out.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        for batch in data:
            if int(batch["timestep"][0]) == timestep:
                model(**batch)
    return torch.cat(seen)


@pytest.mark.parametrize("symmetric", [True, False])
def test_each_timestep_has_its_range(symmetric: bool) -> None:
    """Q-Diffusion's test 3: it contains the inputs of the calibration data at that timestep."""
    model = denoiser(activation_symmetric=symmetric)
    activation = model.out.layer_spec.activation  # type: ignore[union-attr]
    assert activation.timesteps == (900, 500, 100)  # type: ignore[union-attr]
    scale, shift = model.out.input_table()  # type: ignore[operator]
    assert scale.shape == (3, 1) and (shift is None) == symmetric
    for row, timestep in enumerate((900, 500, 100)):
        x = inputs_at(timestep, denoising())
        expected = x.abs().max() / 127 if symmetric else (x.max() - x.min()) / 255
        torch.testing.assert_close(scale[row, 0], expected, rtol=0.05, atol=0)  # the layer before is quantized
    assert (scale[1:] > 3 * scale[:1]).all()
    report = hf_lowbit.report(model)
    dynamic = "int 8 bits" if symmetric else "int 8 bits, asymmetric"
    assert {layer.activation for layer in report.layers} == {f"{dynamic}, static, 3 timesteps", dynamic}


def test_order_and_shape_of_the_batches_do_not_matter() -> None:
    """Also samples of several timesteps in one batch."""
    data = denoising(samples=1)
    merged = [
        {key: torch.cat([first[key], second[key]]) for key in first}
        for first, second in zip(data[::2], data[1::2][::-1], strict=True)
    ]
    tables = [denoiser(given).conv.input_table()[0] for given in (data, data[::-1], merged)]  # type: ignore[operator]
    assert torch.equal(tables[0], tables[1]) and torch.equal(tables[0], tables[2])


def test_a_timestep_that_nothing_reaches_is_not_made_up() -> None:
    """Layers of no usable range at any of them keep dynamic scales, and a note."""
    model = denoiser()
    assert model.idle.layer_spec.activation == ActivationSpec("int", 8)  # type: ignore[union-attr]
    assert any("idle" in line and UNKNOWN_RANGE in line for line in hf_lowbit.report(model).warnings)


def test_groups_of_their_own() -> None:
    grouped = denoiser(activation_group_size=8, overrides={"idle": {"activation_static": False}})
    scale = grouped.out.input_table()[0]  # type: ignore[operator]
    assert scale.shape == (3, 2) and (scale[:, 1] > 20 * scale[:, 0]).all()
    with torch.no_grad():
        for batch in denoising()[::2]:
            y, coarse, exact = grouped(**batch), denoiser()(**batch), Denoiser()(**batch)
            assert (y - exact).norm() <= (coarse - exact).norm() * 1.05


def test_timesteps_that_nobody_tells() -> None:
    with pytest.raises(PlanError, match="the calibration data hold no 'timestep'; add it, or leave it out"):
        denoiser([{"sample": torch.randn(2, 4, 5, 5)}])
    net, data = nn.Sequential(nn.Linear(32, 4)), [{"input": torch.randn(2, 32)}]
    fields = {"activation_timesteps": True, "group_size": None, "dataset": data, "num_samples": 2}
    with pytest.raises(PlanError, match="Sequential is not told a timestep"):
        hf_lowbit.quantize(net, config(**fields))
    assert type(net[0]) is nn.Linear


def test_a_fit_of_the_methods_own() -> None:
    """Recipe.fit_inputs: counts of values per timestep and group; what it returns is stored."""
    seen: list[InputHistogram] = []

    def fit(histogram: InputHistogram, spec: ActivationSpec) -> tuple[ActivationSpec, Tensor, None]:
        seen.append(histogram)
        middle = (histogram.counts * histogram.values.abs().nan_to_num(0.0)).sum(-1) / histogram.counts.sum(-1)
        return replace(spec, bits=6), middle.float().clamp(min=1e-6), None

    model, data = Denoiser(), denoising()
    plan = build_plan(model, config(activation_timesteps=True, group_size=None), ModelFacts())
    Walk(model, plan.layers, lambda block: None, data, pack_parameter, fit_inputs=fit).run()
    out = packed_modules(model)["out"]
    assert out.layer_spec.activation == ActivationSpec("int", 6, static=True, timesteps=(900, 500, 100))
    histogram = next(each for each in seen if each.counts.sum() == 6 * 2 * 25 * 16)
    assert histogram.counts.shape == (3, 1, len(histogram.values)) and (histogram.values.diff() >= 0).all()
    torch.testing.assert_close(
        out.input_scale(), torch.stack([inputs_at(t, data).abs().mean() for t in (900, 500, 100)])[:, None],
        rtol=0.05, atol=0,
    )  # fmt: skip


@pytest.mark.parametrize(("shape", "bits"), [((1,), 16), ((25, 1), 16), ((25, 20), 13), ((100, 64), 12)])
def test_bins_are_coarser_where_there_are_many(shape: tuple[int, ...], bits: int) -> None:
    bins = 1 << bits
    histogram = InputHistogram(shape)
    x = torch.randn(7, 16 * shape[-1], generator=torch.Generator().manual_seed(0))
    histogram.update(x, 0)
    assert histogram.counts.shape == (*shape, bins)
    row = histogram.counts if len(shape) == 1 else histogram.counts[0]
    assert (row.sum(-1) == 7 * 16).all() and int(histogram.counts.sum()) == x.numel()
    values = histogram.values[row.sum(0) > 0]
    nearest = (x.flatten()[:, None] - values).abs().amin(1)
    assert (nearest <= x.flatten().abs() * 2.0 ** (8 - bits)).all()
    assert histogram.low.flatten()[0] == x[:, :16].min() and histogram.high.flatten()[0] == x[:, :16].max()


def _two(folder: Path, name: str) -> None:
    data = denoising((900, 500), samples=1)
    model = denoiser([data[0], data[2], data[1], data[3]])  # each process has the batches of one timestep
    torch.save(packed_modules(model)["conv"].input_scale(), folder / name)


def test_processes_agree(tmp_path: Path) -> None:
    """Each has a part of the batches: timesteps are those of all, ranges too."""
    run_in_two(_two, tmp_path)
    alone = packed_modules(denoiser(denoising((900, 500), samples=1)))["conv"].input_scale()
    assert alone is not None and alone.shape == (2, 1)
    assert all(torch.equal(torch.load(tmp_path / f"rank{rank}"), alone) for rank in range(2))
