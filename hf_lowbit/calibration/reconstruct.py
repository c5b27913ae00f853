"""Block-wise reconstruction: the learned weights of a block are trained until it returns what the float block did.

The setting is BRECQ's (arXiv 2102.05426) as SignRound (arXiv 2309.05516) and OmniQuant (arXiv 2308.13137) use it:
inputs from the quantized blocks before, targets from the float model, the mean squared error between.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hf_lowbit.calibration.block import Block
from hf_lowbit.formats import ActivationSpec
from hf_lowbit.rounding.learned import LearnedWeight
from hf_lowbit.training.optimizers import make_optimizer
from hf_lowbit.training.straight_through import simulate_activation


@dataclass(frozen=True)
class Training:
    """How a block is trained.

    Attributes:
        iterations: steps, each on one batch of the calibration data; 0 leaves the weights as they start.
        learning_rate: at the start.
        decay: it falls linearly to zero; False keeps it, for penalties that harden what is soft towards the end.
        optimizer: "sign": steps along the gradient's sign (SignRound); "adam".
        keep_best: where the last pass over the data lost more than an earlier one, end with the parameters that the
            best pass began with; False always ends with the last ones.
        quantized_inputs: layers whose inputs will be quantized read them so meanwhile; False: as they come.
    """

    iterations: int = 200
    learning_rate: float = 0.005
    optimizer: str = "sign"
    keep_best: bool = True
    decay: bool = True
    quantized_inputs: bool = True


class Learned(Protocol):
    """What is trained."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """All of it."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        """``{"params": [...], "lr_scale": float}`` for each set of parameters with its own share of the rate."""


class Rewrite(Learned, Protocol):
    """What is trained about the block's other parameters, beside the quantization of its weights."""

    def values(self, without: Collection[str] = ()) -> dict[str, Tensor]:
        """Parameter name -> its values now, float32 and differentiable; ``without`` those of these names."""


@torch.enable_grad()
def reconstruct(
    block: Block, learned: Mapping[str, LearnedWeight], training: Training, rewrite: Rewrite | None = None
) -> tuple[float, float]:
    """Train learned weights in place; nothing is packed.

    Args:
        learned: key of :attr:`Block.matrices` -> its learned weight.
        rewrite: what else of the block is trained; without it everything else stays as it is.

    Returns:
        Mean loss of the first and of the last tenth of the steps.
    """
    parts: list[Learned] = [*learned.values(), *([] if rewrite is None else [rewrite])]
    groups = [group for part in parts for group in part.parameter_groups()]
    optimizer = make_optimizer(training.optimizer, groups, training.learning_rate)
    generator = torch.Generator().manual_seed(block.seed)
    best = _Best(parts) if training.keep_best else None
    losses: list[float] = []
    order: list[int] = []
    frozen = [p for p in block.module.parameters() if p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        with _quantized_inputs(block, rewrite is not None) if training.quantized_inputs else nullcontext():
            for step in range(training.iterations):
                if not order:
                    order = torch.randperm(len(block), generator=generator).tolist()
                    if best is not None:
                        best.begin_pass()
                batch = order.pop()
                progress = step / training.iterations
                for group in optimizer.param_groups:
                    group["lr"] = training.learning_rate * group["lr_scale"] * (1 - progress * training.decay)
                for weight in learned.values():
                    weight.anneal_(progress)
                loss = _loss(block, learned, rewrite, batch)
                losses.append(loss.item())
                if best is not None:
                    best.see(losses[-1], len(order) == 0)
                regularizer = sum(weight.regularizer(progress) for weight in learned.values())
                (loss + regularizer).backward()
                optimizer.step()
                optimizer.zero_grad()
                for weight in learned.values():
                    weight.constrain_()
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
    if best is not None:
        best.restore()
    tenth = max(1, len(losses) // 10)
    return (_mean(losses[:tenth]), _mean(losses[-tenth:])) if losses else (0.0, 0.0)


def output_channels(block: Block) -> int:
    """Channels of what the block returns: the loss is a mean over them, where AdaRound and BRECQ sum."""
    target = block.target(0)
    return target.shape[1 if target.dim() == 4 or isinstance(block.module, nn.Conv1d) else -1]


class _Best:
    """The parameters at the beginning of the pass over the data that lost least.

    Whole passes are compared, because batches differ in how hard they are [ours].
    """

    def __init__(self, learned: Iterable[Learned]) -> None:
        self._parameters = [parameter for part in learned for _, parameter in part.named_parameters()]
        self._least, self._sum = float("inf"), 0.0
        self._begun: list[Tensor] = []
        self._kept: list[Tensor] = []
        self._last_is_best = True

    def begin_pass(self) -> None:
        self._sum = 0.0
        self._begun = [parameter.detach().clone() for parameter in self._parameters]

    def see(self, loss: float, ends_pass: bool) -> None:
        self._sum += loss
        if ends_pass:
            self._last_is_best = self._sum < self._least
            if self._last_is_best:
                self._least, self._kept = self._sum, self._begun

    @torch.no_grad()
    def restore(self) -> None:
        if self._last_is_best:
            return
        for parameter, kept in zip(self._parameters, self._kept, strict=False):  # no pass was completed: nothing kept
            parameter.copy_(kept)


def _loss(block: Block, learned: Mapping[str, LearnedWeight], rewrite: Rewrite | None, batch: int) -> Tensor:
    args, kwargs = block.arguments(batch)
    values = _parameters(block, learned)
    if rewrite is not None:
        values = {**rewrite.values(without=values), **values}
    with block.autocast():
        output = block.output_of(functional_call(block.module, values, args, kwargs))
    return torch.nn.functional.mse_loss(output.float(), block.target(batch))


def _parameters(block: Block, learned: Mapping[str, LearnedWeight]) -> dict[str, Tensor]:
    """Parameter name -> its simulated values in the layer's own layout; experts that are not learned stay float."""
    values = {}
    for key in learned:
        matrix = block.matrices[key]
        name = ".".join(part for part in (matrix.layer, matrix.parameter) if part)
        if matrix.expert is None:
            values[name] = matrix.skeleton.from_matrix(matrix.parameter, learned[key]())
        elif name not in values:
            stack = [m for m in block.matrices.values() if (m.layer, m.parameter) == (matrix.layer, matrix.parameter)]
            experts = [learned[m.key]() if m.key in learned else m.weight for m in stack]
            values[name] = matrix.skeleton.from_matrix(matrix.parameter, torch.stack(experts))
    return values


@contextmanager
def _quantized_inputs(block: Block, through_scale: bool) -> Iterator[None]:
    """Layers whose inputs will be quantized read them so while the block trains; gradients pass straight through."""
    handles = []
    for layer, matrix in {matrix.layer: matrix for matrix in block.matrices.values()}.items():
        spec = matrix.layer_spec.activation
        if spec is not None and matrix.skeleton.kind != "experts":
            module = block.module.get_submodule(layer)
            handles.append(module.register_forward_pre_hook(partial(_simulate, spec=spec, through_scale=through_scale)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _simulate(
    module: nn.Module, args: tuple[Tensor, ...], spec: ActivationSpec, through_scale: bool
) -> tuple[Tensor, ...]:
    x, spatial = args[0], len(getattr(module, "kernel_size", ()))
    if not spatial:
        return (simulate_activation(x, spec, through_scale), *args[1:])
    taps = int(torch.Size(module.kernel_size).numel())  # type: ignore[arg-type]
    if (taps > 1 and not spec.static) or (spec.group_size or taps) % taps:
        return args  # scales of patches, which overlap: read as they come [ours]
    own = spec if spec.group_size is None else replace(spec, group_size=spec.group_size // taps)
    channels = -1 - spatial
    read = simulate_activation(x.movedim(channels, -1), own, through_scale).movedim(-1, channels)
    return (read, *args[1:])


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
