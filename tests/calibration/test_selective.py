"""Selective finetuning: what is chosen is trained, judged by other samples, and undone where it does not help."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hf_lowbit
from hf_lowbit.calibration.roles import find_roles
from hf_lowbit.calibration.selective import Samples, Stage, finetune
from hf_lowbit.calibration.timesteps import by_timestep, held_out, timesteps_of
from hf_lowbit.calibration.trained_layers import TrainedLayers
from hf_lowbit.formats import decode
from hf_lowbit.nn.timestep import at_timestep
from hf_lowbit.plan import packed_modules
from tests.matrix.models import fingerprint

TIMES = (900, 500, 100)
STAGE = Stage("all", ("time", "up"), ("time",), ("first", "time", "up", "down"), 1e-3, 3e-3, epochs=4)


class Denoiser(nn.Module):
    """A convolution, a time embedding that is added, a feed-forward layer whose inputs drift along the trajectory."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(4, 16, 3, padding=1), nn.Conv2d(16, 4, 3, padding=1)
        self.time, self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, sample: Tensor, timestep: Tensor) -> tuple[Tensor]:
        times = timestep.reshape(-1, 1).to(sample) / 1000
        x = self.first(sample) + self.time(torch.cos(6 * times * torch.arange(8)))[:, :, None, None]
        x = x.movedim(1, -1) * (1 + 2 * times[:, :, None, None])
        return (self.last((x + self.down(nn.functional.gelu(self.up(x)))).movedim(-1, 1)),)


def batches(seed: int = 0, samples: int = 16) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {"sample": torch.randn(samples, 4, 8, 8, generator=generator), "timestep": torch.full((samples,), time)}
        for time in TIMES
    ]


@pytest.fixture(scope="module")
def models() -> tuple[Denoiser, Any]:
    """Float, and quantized with scales of each timestep."""
    torch.manual_seed(0)
    model = Denoiser().eval()
    config = hf_lowbit.AdaRoundConfig(
        bits=4, iterations=0, activation_bits=4, activation_symmetric=False, activation_static=True,
        activation_timesteps=True, num_samples=48,
    )  # fmt: skip
    return model, hf_lowbit.quantize(copy.deepcopy(model), config, data=batches())


def tuned(models: tuple[Denoiser, Any], stage: Stage = STAGE, seed: int = 0) -> tuple[Any, Any]:
    original, model = models[0], copy.deepcopy(models[1])
    return model, finetune(original, model, Samples.of(batches(), 4), stage, seed)


def error(original: nn.Module, model: nn.Module, data: list[dict[str, Tensor]]) -> float:
    with torch.no_grad():
        return sum(float((model(**batch)[0] - original(**batch)[0]).square().sum()) for batch in data)


# 2
def test_held_out_samples_of_every_timestep_gain(models: tuple[Denoiser, Any]) -> None:
    model, result = tuned(models)
    assert result.kept and result.after < 0.9 * result.before and 1 <= result.epoch <= 4
    for batch in batches(seed=9):
        assert error(models[0], model, [batch]) < error(models[0], models[1], [batch])


# 1, 4
def test_only_what_was_chosen_changes_and_weights_stay_on_their_grids(models: tuple[Denoiser, Any]) -> None:
    before, after = fingerprint(models[1]), fingerprint(tuned(models)[0])
    changed = {name for name in before if before[name] != after[name]}
    scales = {f"{name}.weight_input_{part}" for name in STAGE.inputs for part in ("scale", "shift")}
    assert changed <= scales | {"time.weight", "up.weight", "time.bias"}
    assert {"up.weight", "time.bias", "up.weight_input_scale", "down.weight_input_scale"} <= changed


def test_zero_stays_exact_in_trained_inputs(models: tuple[Denoiser, Any]) -> None:
    for module in packed_modules(tuned(models)[0]).values():
        scale, shift = module.input_table()
        assert torch.allclose(shift / scale, (shift / scale).round(), atol=1e-4)


def test_a_stage_that_does_not_help_leaves_no_trace(models: tuple[Denoiser, Any]) -> None:
    model, result = tuned(models, replace(STAGE, weight_rate=0.9, input_rate=0.9))
    assert not result.kept and result.after >= result.before
    assert fingerprint(model) == fingerprint(models[1])
    assert all(not parameter.requires_grad or parameter.is_floating_point() for parameter in model.parameters())


def test_it_is_the_seed_that_decides(models: tuple[Denoiser, Any]) -> None:
    first, second, other = (fingerprint(tuned(models, seed=seed)[0]) for seed in (0, 0, 1))
    assert first == second and first != other


def test_the_float_model_is_not_touched(models: tuple[Denoiser, Any]) -> None:
    before = fingerprint(models[0])
    tuned(models)
    assert fingerprint(models[0]) == before and all(p.requires_grad for p in models[0].parameters())


def test_trained_layers_compute_as_the_codes_do(models: tuple[Denoiser, Any]) -> None:
    model = copy.deepcopy(models[1])
    layers = TrainedLayers(model, STAGE.weights, STAGE.biases, STAGE.inputs)
    for batch in batches(seed=9):
        with torch.no_grad():
            expected = model(**batch)[0]
            with layers.applied():
                assert torch.allclose(model(**batch)[0], expected, atol=1e-3 * float(expected.abs().max()))
    assert not any("multiply" in module.__dict__ for module in packed_modules(model).values())


# 5
def test_gradients_reach_chosen_weights_and_the_scales_of_the_timestep_alone(models: tuple[Denoiser, Any]) -> None:
    model = copy.deepcopy(models[1])
    layers = TrainedLayers(model, STAGE.weights, (), STAGE.inputs)
    with layers.applied():
        model(**batches()[1])[0].square().sum().backward()
    assert all(bool(weight.grad.any()) for weight in layers.weights) and len(layers.weights) == 2  # type: ignore[union-attr]
    has_gradient = [step.grad is not None for step in layers.steps]
    assert has_gradient == [False, True, False] * 4


def test_samples_are_sorted_by_timestep_and_a_part_is_held_out() -> None:
    mixed = {"sample": torch.arange(6.0)[:, None], "timestep": torch.tensor([1, 9, 1, 9, 9, 1]), "flag": True}
    shared = {"nested": {"of_samples": torch.arange(6), "of_all": torch.arange(5)}}
    found = by_timestep([{**mixed, **shared}, {"sample": torch.zeros(1, 1), "timestep": torch.tensor([9])}])
    assert [*found] == [9.0, 1.0] and [len(own) for own in found.values()] == [2, 1]
    batch = found[1.0][0].load()
    assert batch["sample"].flatten().tolist() == batch["nested"]["of_samples"].tolist() == [0, 2, 5]
    assert batch["flag"] is True and len(batch["nested"]["of_all"]) == 5
    trained, judged = held_out(found[1.0], 2)
    assert [part.rows for part in trained] == [(0, 2)] and [part.rows for part in judged] == [(5,)]
    trained, judged = held_out(found[9.0], 2)
    assert [(part.index, part.rows) for part in trained] == [(0, (1, 3)), (0, (4,))]
    assert [(part.index, part.rows) for part in judged] == [(1, (0,))]
    alone = Samples.of([{"sample": torch.zeros(1, 1), "timestep": torch.tensor([9])}], 2)
    assert len(alone.judged) == 1, "of a single sample there is nothing else to judge by"
    assert timesteps_of({"sample": torch.zeros(1)}) is None


def test_samples_of_different_timesteps_are_not_trained_on_together(models: tuple[Denoiser, Any]) -> None:
    model = copy.deepcopy(models[1])
    mixed = torch.cat([batch["sample"][:1] for batch in batches()])
    with TrainedLayers(model, (), (), ()).applied(), pytest.raises(ValueError, match="one after the other"):
        model(mixed, torch.tensor(TIMES))


def test_roles_are_found_by_trying() -> None:
    torch.manual_seed(0)
    roles = find_roles(Denoiser().eval(), batches()[0])
    assert (roles.time, roles.ends, roles.others) == (("time",), ("first", "last"), ("up", "down"))


def test_scales_that_training_would_drive_below_zero_are_kept_positive(models: tuple[Denoiser, Any]) -> None:
    layers = TrainedLayers(copy.deepcopy(models[1]), (), (), STAGE.inputs)
    before = [step.detach().clone() for step in layers.steps]
    with torch.no_grad():
        for step in layers.steps:
            step -= 100
    layers.constrain_()
    assert all(torch.allclose(step, 0.1 * old) for step, old in zip(layers.steps, before, strict=True))


def test_weights_decode_to_what_was_trained(models: tuple[Denoiser, Any]) -> None:
    model = copy.deepcopy(models[1])
    layers = TrainedLayers(model, ("up",), (), ())
    (values,) = layers.weights
    with torch.no_grad():
        values += 0.05 * torch.randn_like(values)
    trained = layers.layers["up"].weight()  # type: ignore[misc]
    layers.store()
    assert torch.equal(decode(model.up.packed()), trained)
    with at_timestep(500), torch.no_grad():
        assert torch.isfinite(model.up(torch.randn(2, 16))).all()
