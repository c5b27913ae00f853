"""Low-rank compensation of a block's layers, weighted by what they read when its first matrix is packed.

Inputs come from blocks that are packed and compensated already, and from layers of this one that are float still
(EoRA's sequential pass, arXiv 2410.21271).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_lowbit.calibration.matrices import Matrix, as_read, why_without_inputs
from hf_lowbit.calibration.statistics import Hessian, Statistic
from hf_lowbit.calibration.weighting import statistic_for, weighting_of
from hf_lowbit.compensation.stacked import target_of_rounding
from hf_lowbit.formats import PackedTensor, WeightSpec, decode
from hf_lowbit.nn import PackedLinear, PackedModule

if TYPE_CHECKING:
    from hf_lowbit.calibration.block import Block

Rounding = Callable[[Tensor, WeightSpec], PackedTensor]


@dataclass(frozen=True)
class Compensation:
    """How the layers of a model are compensated.

    Attributes:
        ranks: full layer name -> rank, 0 for none.
        metric: of :data:`hf_lowbit.compensation.METRICS`.
        iterations: of rounding and factors in turns, for methods that round a matrix by itself.
        transformed: factors read the input as a layer's transform leaves it, as a branch does; an adapter reads it as
            it comes.
    """

    ranks: Mapping[str, int] = field(default_factory=dict)
    metric: str = "identity"
    iterations: int = 1
    transformed: bool = True

    def target(
        self, weight: Tensor, skeleton: PackedModule, parameter: str, where: str, rounding: Rounding, weighting: Any
    ) -> Tensor:
        """What a method that rounds a matrix by itself has to round: the weight, or that less factors found in turns.

        Args:
            weight: ``[rows, columns]``, or a stack of them.
            where: the layer's full name.
            weighting: of its inputs, or a list of them for a stack.
        """
        rank, spec = self.ranks.get(where, 0), skeleton.layer_spec
        if self.iterations == 1 or not rank:
            return weight

        def decoded(matrix: Tensor) -> Tensor:
            return decode(rounding(matrix, spec.weight))

        bits, branches = spec.factor_bits, skeleton.branches(parameter)
        return target_of_rounding(weight, decoded, rank, self.iterations, bits, branches, weighting)


UNCOMPENSATED = Compensation()


class BlockCompensation:
    """Weightings of one block's matrices."""

    def __init__(self, block: Block, how: Compensation) -> None:
        self._block, self.how = block, how
        self._statistics: dict[str, Statistic] | None = None if how.metric != "identity" else {}

    def collect(self) -> None:
        """Run all data, unless that has been done: every layer is float still."""
        if self._statistics is not None:
            return
        matrices = self._block.matrices
        keys = [key for key, m in matrices.items() if self._rank(m) and why_without_inputs(m) is None]
        self._statistics = self._block.gather(statistic_for(self.how.metric), keys) if keys else {}

    def weighting(self, matrix: Matrix) -> Tensor | None:
        """For the factors of a matrix that is not replaced yet; None, and a note, where it has no inputs."""
        if self.how.metric == "identity" or not self._rank(matrix):
            return None
        self.collect()
        assert self._statistics is not None
        statistic = self._statistics.get(matrix.key)
        if statistic is None or statistic.tokens == 0:
            return None
        layer = matrix.skeleton
        if not (self.how.transformed and isinstance(layer, PackedLinear) and layer.layer_spec.transform is not None):
            return weighting_of(statistic)
        if isinstance(statistic, Hessian):
            return as_read(matrix, statistic)
        # of a transformed input the other statistics do not follow from those of the input: once more through the data
        make = statistic_for(self.how.metric)
        again = self._block.gather(lambda channels, device: _Transformed(make(channels, device), layer), [matrix.key])
        return weighting_of(again[matrix.key].own)

    def why_identity(self, matrix: Matrix) -> str | None:
        """Why the factors of a matrix take another metric than the configured one; None if they do not."""
        if self.how.metric == "identity" or not self._rank(matrix):
            return None
        reason = why_without_inputs(matrix)
        statistic = (self._statistics or {}).get(matrix.key)
        if reason is None and (statistic is None or statistic.tokens == 0):
            reason = "no token of the calibration data reaches it"
        return None if reason is None else f"its low-rank part takes metric='identity' ({reason})"

    def forget(self, key: str) -> None:
        """Free a statistic that is used."""
        if self._statistics:
            self._statistics.pop(key, None)

    def _rank(self, matrix: Matrix) -> int:
        return self.how.ranks.get(self._block.full_name(matrix.layer), 0)


class _Transformed:
    """A statistic of inputs as a layer's transform leaves them."""

    def __init__(self, own: Statistic, layer: PackedLinear) -> None:
        self.own, self._layer = own, layer

    @property
    def tokens(self) -> int:
        return self.own.tokens

    @tokens.setter
    def tokens(self, value: int) -> None:
        self.own.tokens = value

    def update(self, x: Tensor) -> None:
        self.own.update(self._layer.transformed(x))

    def summed(self) -> list[Tensor]:
        return self.own.summed()

    def largest(self) -> list[Tensor]:
        return self.own.largest()


def round_each(rounding: Rounding) -> Callable[[Block], None]:
    """A data-free method as a step of the walk: its own rounding of every matrix, for a metric that needs inputs."""

    @torch.no_grad()
    def step(block: Block) -> None:
        for key, matrix in block.matrices.items():
            block.pack(key, rounding(block.target_of_rounding(key, rounding), matrix.spec))

    return step
