"""Selective finetuning: a few layers' weights and all input scales of a packed diffusion model, trained as a whole.

QuEST (arXiv 2402.03666): in each stage the chosen layers are to return what they did in the float model, and the model
is to predict what it did. Inputs are recorded samples (teacher forcing): how errors add up over steps is not seen.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from hf_lowbit.calibration.inspected import first_output
from hf_lowbit.calibration.parallel import agree
from hf_lowbit.calibration.predictions import prediction_of
from hf_lowbit.calibration.timesteps import Part, by_timestep, held_out
from hf_lowbit.calibration.trainable import in_float32, only_trained
from hf_lowbit.calibration.trained_layers import TrainedLayers
from hf_lowbit.calibration.units import Batch
from hf_lowbit.nn.timestep import at_timestep

logger = logging.getLogger("hf_lowbit")


@dataclass(frozen=True)
class Stage:
    """What is trained together.

    Attributes:
        title: for reports.
        weights: layers whose weights are trained, and whose outputs count beside the model's.
        biases: layers whose biases are trained.
        inputs: layers whose stored input scales are trained, those of a sample's timestep with it.
        weight_rate, input_rate: of Adam; of weights and biases, and of scales.
        epochs: passes over the data; the best is kept.
    """

    title: str
    weights: tuple[str, ...]
    biases: tuple[str, ...]
    inputs: tuple[str, ...]
    weight_rate: float
    input_rate: float
    epochs: int


@dataclass(frozen=True)
class Finetuned:
    """What came of a stage.

    Attributes:
        before, after: squared error of the model's output on held-out samples, relative to their mean square.
        epoch: the pass that was best, from 1.
        kept: whether the error became less; if not, the model is as it was.
    """

    before: float
    after: float
    epoch: int
    kept: bool


@dataclass(frozen=True)
class Samples:
    """Recorded samples, those of one timestep in each part.

    Attributes:
        trained: what is trained on.
        judged: what decides, held out where a timestep has more than one sample.
    """

    trained: list[Part]
    judged: list[Part]

    @classmethod
    def of(cls, batches: Sequence[Batch], samples: int) -> Samples:
        """In pieces of at most ``samples``."""
        split = [held_out(own, samples) for own in by_timestep(batches).values()]
        trained, judged = ([part for parts in split for part in parts[index]] for index in range(2))
        return cls(trained, judged or trained)


def finetune(original: nn.Module, model: nn.Module, samples: Samples, stage: Stage, seed: int = 0) -> Finetuned:
    """One stage, in place; undone where it does not help.

    The loss is the mean over the stage's layers of the mean squared error of their outputs, plus that of the model's:
    QuEST's code adds both for every layer, which is the same up to a factor.

    Args:
        original: the float model.
        model: packed, in evaluation mode.
        seed: of the order of the samples.
    """
    with in_float32(model) as types:
        layers = TrainedLayers(model, stage.weights, stage.biases, stage.inputs)
        judge = _Judge(original, samples.judged)
        start = [parameter.detach().clone() for parameter in layers.trained]
        with layers.applied():
            before = judge.error(model)
            best, epoch = before, 0
            values = start
            with only_trained(model, layers.biases):
                for number, error in enumerate(
                    _epochs(original, model, samples.trained, stage, layers, judge, seed), 1
                ):
                    logger.info("%s, pass %d of %d: error %.4g", stage.title, number, stage.epochs, error)
                    if error < best:
                        best, epoch, values = error, number, [p.detach().clone() for p in layers.trained]
            _set(layers.trained, values)
            for bias in layers.biases:  # as they will be stored
                bias.data = bias.data.to(types[bias]).float()
            after = judge.error(model)
        kept = after < before
        if kept:
            layers.store()
        else:
            _set(layers.trained, start)
    for tensor in model.state_dict().values():
        agree(tensor)  # each process has trained on its own samples
    return Finetuned(before, after, epoch, kept)


@torch.enable_grad()
def _epochs(
    original: nn.Module,
    model: nn.Module,
    parts: Sequence[Part],
    stage: Stage,
    layers: TrainedLayers,
    judge: _Judge,
    seed: int,
) -> Iterator[float]:
    """Train; the error on what judges after each pass."""
    rates = ((layers.weights + layers.biases, stage.weight_rate), (layers.steps, stage.input_rate))
    groups = [{"params": parameters, "lr": rate} for parameters, rate in rates if parameters]
    if not groups:
        return
    optimizer = torch.optim.Adam(groups)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(stage.epochs):
        for index in torch.randperm(len(parts), generator=generator).tolist():
            _loss(original, model, parts[index].load(), stage.weights).backward()
            optimizer.step()
            optimizer.zero_grad()  # to None: Adam leaves the scales of other timesteps alone
            layers.constrain_()
        yield judge.error(model)


def _loss(original: nn.Module, model: nn.Module, batch: Batch, names: Collection[str]) -> Tensor:
    with torch.no_grad(), _recorded(original, names) as right:
        target = _predict(original, batch)
    with _recorded(model, names) as mine:
        loss = F.mse_loss(_predict(model, batch), target)
    called = [name for name in names if name in mine]
    local = [F.mse_loss(mine[name].float(), right[name].float()) for name in called]
    return loss + torch.stack(local).mean() if local else loss


class _Judge:
    """The float model's predictions on some samples."""

    @torch.no_grad()
    def __init__(self, original: nn.Module, parts: Sequence[Part]) -> None:
        self._parts = parts
        self._right = [_predict(original, part.load()) for part in parts]
        self._power = sum(float(right.double().square().sum()) for right in self._right)

    @torch.no_grad()
    def error(self, model: nn.Module) -> float:
        """Squared error, relative to what is right."""
        total = 0.0
        for part, right in zip(self._parts, self._right, strict=True):
            total += float((_predict(model, part.load()) - right).double().square().sum())
        return total / self._power


@contextmanager
def _recorded(model: nn.Module, names: Collection[str]) -> Iterator[Mapping[str, Tensor]]:
    """What the layers of these names return within it, in their last call."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module, args: Any, output: Any) -> None:
        outputs[name] = first_output(output)

    with ExitStack() as stack:
        for name in names:
            stack.callback(model.get_submodule(name).register_forward_hook(partial(keep, name)).remove)
        yield outputs


def _predict(model: nn.Module, batch: Batch) -> Tensor:
    with at_timestep(batch.get("timestep")):
        return prediction_of(model(**_floats_as(model, batch))).float()


def _floats_as(model: nn.Module, batch: Batch) -> Batch:
    """The batch with floats of the model's type; a timestep keeps its own."""
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())

    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    cast_batch: Batch = tree_map(cast, dict(batch))
    return {**cast_batch, "timestep": batch["timestep"]} if "timestep" in batch else cast_batch


@torch.no_grad()
def _set(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)
