"""Which layers of a denoiser read the timestep alone, and which stand at its ends: found by trying, for any class."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_lowbit.calibration.listening import layers_of_kind, told_inputs
from hf_lowbit.calibration.units import Batch, first_sample, without_cache

_SAMPLES = ("sample", "hidden_states")  # diffusers' names of what is denoised


@dataclass(frozen=True)
class Roles:
    """Linear and convolution layers, in the order of their calls.

    Attributes:
        time: what they read changes with the timestep, and not with the sample: embeddings of time and their
            projections in every block, those of a class label or a pooled text with them.
        ends: the first and the last of those whose input changes with the sample.
        others: all others that are called.
    """

    time: tuple[str, ...]
    ends: tuple[str, ...]
    others: tuple[str, ...]

    @property
    def called(self) -> tuple[str, ...]:
        """All of them."""
        return (*self.time, *self.ends, *self.others)


@torch.no_grad()
def find_roles(model: nn.Module, batch: Batch) -> Roles:
    """Three forwards of a batch: as it is, with other samples, at other timesteps.

    Args:
        model: float, in evaluation mode.
        batch: keyword arguments of its forward, "timestep" among them.
    """
    given = first_sample(without_cache(model, batch))
    name = next((name for name in _SAMPLES if name in given), None)
    name = name or next(key for key, value in given.items() if isinstance(value, Tensor) and value.dim() > 2)
    usual = _inputs(model, given)
    by_sample = _inputs(model, {**given, name: given[name] + 1})
    by_time = _inputs(model, {**given, "timestep": given["timestep"] + 1})
    varying = {layer for layer in usual if usual[layer] != by_sample[layer]}
    time = [layer for layer in usual if layer not in varying and usual[layer] != by_time[layer]]
    reading = [layer for layer in usual if layer in varying]
    ends = dict.fromkeys([*reading[:1], *reading[-1:]])
    return Roles(tuple(time), tuple(ends), tuple(layer for layer in usual if layer not in {*time, *ends}))


def _inputs(model: nn.Module, batch: Batch) -> dict[str, tuple[float, float]]:
    """Layer -> sums that tell what it reads in its first call from anything else, in the order of the calls."""
    found: dict[str, tuple[float, float]] = {}

    def keep(name: str, module: nn.Module, x: Tensor) -> None:
        if name not in found:
            found[name] = float(x.double().sum()), float(x.double().square().sum())

    with told_inputs(layers_of_kind(model, (nn.Linear, nn.Conv1d, nn.Conv2d)), keep):
        model(**batch)
    return found
