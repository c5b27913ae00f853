"""Low-rank terms that are trained to make good a block's error, and fused into its weights before they are rounded.

QLLM's error correction (arXiv 2310.08041, section 4.3). The weights of the block become W + s B A, with B = 0 at first,
trained so that the block returns what the float one did. What is trained is what is deployed: the forward pass computes
with Q(W + s B A), gradients pass straight through the rounding [ours: the authors train Q(W) + s B A, and round the sum
afterwards].
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hf_lowbit.calibration.block import Block
from hf_lowbit.calibration.norms import norm_parameters
from hf_lowbit.calibration.reassembling import linear_layers, quantized_inputs
from hf_lowbit.formats import WeightSpec
from hf_lowbit.nn import PackedLinear
from hf_lowbit.rounding.clip import fit_range
from hf_lowbit.rounding.store import format_for, to_groups

logger = logging.getLogger("hf_lowbit")


@dataclass(frozen=True)
class CorrectionPlan:
    """How a correction is trained; the defaults are the authors', but for the norms.

    Attributes:
        rank: of every layer without one in ``ranks``.
        ranks: name in the block -> rank; 0 leaves a layer as it is.
        alpha: s is alpha / rank.
        epochs: passes over the data, each step on one batch.
        learning_rate: of AdamW at the start, falling linearly to zero.
        train_norms: train the block's norms too.
    """

    rank: int = 4
    ranks: Mapping[str, int] = field(default_factory=dict)
    alpha: float = 1.0
    epochs: int = 10
    learning_rate: float = 5e-4
    train_norms: bool = False

    def rank_of(self, layer: str) -> int:
        """Of a layer of the block."""
        return self.ranks.get(layer, self.rank)


class Correction(nn.Module):
    """What is trained of a block: A and B of every layer, and the weights and biases of the norms.

    Attributes:
        layers: name in the block -> packed layer to be, its parameters still the float layer's.
    """

    def __init__(self, block: Block, layers: Mapping[str, PackedLinear], plan: CorrectionPlan) -> None:
        super().__init__()
        self.layers = dict(layers)
        self.scalings = [plan.alpha / max(1, plan.rank_of(name)) for name in self.layers]
        generator = torch.Generator().manual_seed(block.seed)
        pairs = [_factors(layer, plan.rank_of(name), generator) for name, layer in self.layers.items()]
        self.a = nn.ParameterList([a for a, _ in pairs])
        self.b = nn.ParameterList([b for _, b in pairs])
        norms = norm_parameters(block.module) if plan.train_norms else {}
        self.norm_names = list(norms)
        self.norms = nn.ParameterList([parameter.detach().clone() for parameter in norms.values()])

    def corrected(self) -> dict[str, Tensor]:
        """Parameter of the block -> W + s B A, as the float layer lays it out."""
        parts = zip(self.layers.items(), self.scalings, self.a, self.b, strict=True)
        return {
            f"{name}.weight" if name else "weight": layer.weight.detach() + layer.arranged(scaling * (b @ a))
            for (name, layer), scaling, a, b in parts
        }

    def simulated(self) -> dict[str, Tensor]:
        """Parameter of the block -> its value while the block trains: rounded weights, norms."""
        values = dict(zip(self.norm_names, self.norms, strict=True))
        for layer, (name, weight) in zip(self.layers.values(), self.corrected().items(), strict=True):
            matrix = layer.to_matrix("weight", weight)
            with torch.no_grad():
                step = rounded(matrix, layer.layer_spec.weight) - matrix
            values[name] = layer.arranged(matrix + step)
        return values

    @torch.no_grad()
    def fuse(self, block: Block) -> None:
        """Put the corrected weights and the norms into the block."""
        for name, value in (*self.corrected().items(), *zip(self.norm_names, self.norms, strict=True)):
            block.module.get_parameter(name).copy_(value)


def correct(block: Block, layers: Mapping[str, PackedLinear], plan: CorrectionPlan) -> tuple[float, float]:
    """Train a correction on the block's data and fuse it; one that does not lower the error is left out [ours].

    Args:
        layers: float still, with their transforms.

    Returns:
        Mean squared error of the block's output before and after.
    """
    correction = Correction(block, layers, plan)
    with quantized_inputs(block, layers):
        before = _mean_loss(block, correction)
        _train(block, correction, plan)
        after = _mean_loss(block, correction)
    if after < before:
        correction.fuse(block)
    else:
        logger.info("%s: the correction did not lower the error and is left out; lower learning_rate", block.name)
    return before, min(before, after)


def corrected_first(step: Callable[[Block], None], ranks: Callable[[str], int]) -> Callable[[Block], None]:
    """A method's step on blocks that are corrected first, as ``LowRankConfig(keep="fused")`` asks for.

    Args:
        step: the method's, which rounds the corrected weights in its own way; in training they are rounded to nearest
            [ours], so that a method that rounds much better may gain nothing, or lose.
        ranks: full layer name -> rank.
    """

    @torch.no_grad()
    def corrected(block: Block) -> None:
        wanted = {m.layer: ranks(block.full_name(m.layer)) for m in block.matrices.values()}
        layers = {name: layer for name, layer in linear_layers(block).items() if wanted[name]}
        before, after = correct(block, layers, CorrectionPlan(ranks=wanted)) if layers else (0.0, 0.0)
        step(block)
        for key, matrix in block.matrices.items():
            if wanted[matrix.layer] and matrix.layer not in layers:
                block.note(key, "low-rank corrections are fused into linear layers only")
            elif wanted[matrix.layer] and not after < before:
                block.note(key, "its low-rank correction did not lower the block's error and was left out")

    return corrected


@torch.enable_grad()
def _train(block: Block, correction: Correction, plan: CorrectionPlan) -> None:
    trained = list(correction.parameters())
    optimizer = torch.optim.AdamW(trained, lr=plan.learning_rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(block.seed)
    steps = plan.epochs * len(block)
    for epoch in range(plan.epochs):
        for place, batch in enumerate(torch.randperm(len(block), generator=generator).tolist()):
            for group in optimizer.param_groups:
                group["lr"] = plan.learning_rate * (1 - (epoch * len(block) + place) / steps)
            loss = _loss(block, correction, batch)
            # gradients of these alone: the block's own parameters collect none
            gradients = torch.autograd.grad(loss, trained, allow_unused=True)
            for parameter, gradient in zip(trained, gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()


def _loss(block: Block, correction: Correction, batch: int) -> Tensor:
    args, kwargs = block.arguments(batch)
    output = block.output_of(functional_call(block.module, correction.simulated(), args, kwargs))
    return torch.nn.functional.mse_loss(output, block.target(batch))


@torch.no_grad()
def _mean_loss(block: Block, correction: Correction) -> float:
    return sum(_loss(block, correction, batch).item() for batch in range(len(block))) / len(block)


def _factors(layer: PackedLinear, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A ``[rank, in]``, uniform as LoRA's, and B ``[out, rank]`` = 0."""
    bound = 1 / math.sqrt(layer.in_features)
    a = torch.empty(rank, layer.in_features).uniform_(-bound, bound, generator=generator)
    device = layer.weight.device
    return a.to(device), torch.zeros(layer.out_features, rank, device=device)


def rounded(matrix: Tensor, spec: WeightSpec) -> Tensor:
    """What rounding ``[rows, columns]`` to nearest decodes to, without packing it."""
    number_format, _ = format_for(matrix, spec)
    grouped = matrix.float().reshape(1, 1, -1) if spec.group_size == "tensor" else to_groups(matrix, spec)
    grid = fit_range(grouped, spec, number_format)
    values = number_format.nearest(grid.to_table_units(grouped)) - grid.zero_point.unsqueeze(-1)
    return (values * grid.scale.unsqueeze(-1)).reshape(matrix.shape)
