"""End-to-end tuning: the scales of a packed model and the gains of its norms, trained until it predicts what the float
model did.

Training the step sizes alone on the whole model is EfficientQAT's second phase (E2E-QP, arXiv 2407.11062); the float
model's predictions as the target, and norms that are trained too, are [ours]. The codes stay: nothing is added to the
file, and nothing at run time.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hf_lowbit.calibration.autocast import autocast
from hf_lowbit.calibration.heap import hand_back_memory
from hf_lowbit.calibration.norms import norm_parameters
from hf_lowbit.calibration.parallel import processes
from hf_lowbit.calibration.predictions import Piece, Predictions
from hf_lowbit.calibration.stacks import find_stacks
from hf_lowbit.calibration.trainable import in_float32, only_trained, recomputing
from hf_lowbit.calibration.tuned_scales import TunedScales
from hf_lowbit.kernels.routes import has_bfloat16_units
from hf_lowbit.plan import packed_modules

logger = logging.getLogger("hf_lowbit")

_WARM_UP = 3  # steps; Adam's first ones are as large as the rate, whatever the gradient
_BETAS = (0.9, 0.95)  # the runs are short
_JUDGED = 8  # pieces of the data that decide whether the result is kept


@dataclass(frozen=True)
class Tuned:
    """What came of it.

    Attributes:
        before, after: loss (:meth:`Predictions.loss`) on a part of the calibration data.
        kept: whether it became less; if not, the model is as it was.
        layers: names of those whose scales were trained.
    """

    before: float
    after: float
    kept: bool
    layers: tuple[str, ...]


def tune(
    model: nn.Module, predictions: Predictions, *, epochs: int, learning_rate: float, samples: int, seed: int = 0
) -> Tuned:
    """Train a packed model in place with Adam; meanwhile it is float32, and its products bfloat16 where that is faster.

    Args:
        model: all its planned layers packed, in evaluation mode.
        predictions: of the float model.
        epochs: passes over the data.
        learning_rate: of the logarithm of each scale, and of norms relative to their mean magnitude; it falls linearly
            to zero.
        samples: of each step.
        seed: of the order of the data.
    """
    pieces = _as_many(predictions.pieces(samples))
    hand_back_memory()  # of the float weights
    device = next(model.parameters()).device
    with in_float32(model, tables_stay=has_bfloat16_units(device)) as types:
        hand_back_memory()
        scales, norms = TunedScales(model), list(norm_parameters(model).values())
        originals = [norm.detach().clone() for norm in norms]
        judged = pieces[:: max(1, len(pieces) // _JUDGED)]
        with scales.applied(), autocast(device, mixed_precision=True):
            before = _mean_loss(model, predictions, judged)
            hand_back_memory()
            with only_trained(model, norms), recomputing(_blocks(model)):
                _train(model, predictions, pieces, scales, norms, epochs, learning_rate, seed)
            for norm in norms:  # as they will be stored
                norm.data = norm.data.to(types[norm]).float()
            after = _mean_loss(model, predictions, judged)
        kept = after < before
        if kept:
            scales.store()
        else:
            for norm, original in zip(norms, originals, strict=True):
                norm.data = original
    return Tuned(before, after, kept, tuple(scales.layers))


@torch.enable_grad()
def _train(
    model: nn.Module,
    predictions: Predictions,
    pieces: list[Piece],
    scales: TunedScales,
    norms: list[nn.Parameter],
    epochs: int,
    learning_rate: float,
    seed: int,
) -> None:
    groups = [{"params": list(scales.logs), "share": 1.0}]
    groups += [{"params": [norm], "share": float(norm.detach().abs().mean()) or 1.0} for norm in norms]
    optimizer = torch.optim.Adam(groups, lr=learning_rate, betas=_BETAS)
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    generator = torch.Generator().manual_seed(seed)
    steps, step = epochs * len(pieces), 0
    for epoch in range(epochs):
        losses = []
        for place in torch.randperm(len(pieces), generator=generator).tolist():
            rate = learning_rate * min(1 - step / steps, (step + 1) / _WARM_UP)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["share"]
            losses.append(0.0)
            for part, share in predictions.parts(pieces[place]):  # one by one: activations take memory
                loss = predictions.loss(model, part) * share
                loss.backward()
                losses[-1] += loss.item()
                hand_back_memory()  # logits and their gradients leave holes that the next ones do not fit into
            _average(trained)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
        logger.info("tuning, pass %d of %d: loss %.4g", epoch + 1, epochs, sum(losses) / len(losses))


def _blocks(model: nn.Module) -> list[nn.Module]:
    """Those that follow each other: what all of them compute would have to be kept at once."""
    stacks = find_stacks(model, packed_modules(model))
    return [model.get_submodule(name) for stack in stacks for name in stack.blocks]


def _as_many(pieces: list[Piece]) -> list[Piece]:
    """As many in every process: each of their steps is one of all."""
    fewest = torch.tensor(len(pieces))
    if processes() > 1:
        dist.all_reduce(fewest, dist.ReduceOp.MIN)
    return pieces[: int(fewest)]


def _average(parameters: list[nn.Parameter]) -> None:
    """Gradients over all processes."""
    if processes() == 1:
        return
    for parameter in parameters:
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        dist.all_reduce(gradient)
        parameter.grad = gradient / processes()


@torch.no_grad()
def _mean_loss(model: nn.Module, predictions: Predictions, pieces: list[Piece]) -> float:
    parts = [(part, share / len(pieces)) for piece in pieces for part, share in predictions.parts(piece)]
    total: Tensor = torch.stack([predictions.loss(model, part) * share for part, share in parts]).sum()
    if processes() > 1:
        dist.all_reduce(total)
    return float(total) / processes()
