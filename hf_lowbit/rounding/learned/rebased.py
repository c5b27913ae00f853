"""Re-based rounding: the values of a packed weight are trained on, and rounded to the grid that they lie on.

QuEST (arXiv 2402.03666) trains weights that AdaRound has rounded. Its code keeps AdaRound's bits, so that a weight that
crosses a grid line is still rounded to the side that was right before. Here training starts from the dequantized values
and rounds to nearest [ours]: the start is the same, to the last code, and no bit is out of date.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from hf_lowbit.formats import PackedTensor, decode
from hf_lowbit.rounding.grid import Grid
from hf_lowbit.rounding.learned.base import LearnedWeight
from hf_lowbit.rounding.learned.functions import nearest, quantize


class RebasedRounding(LearnedWeight):
    """w_hat = s * (clamp(round(W / s) + z) - z), s and z those of a packed weight, W what it decodes to at first.

    Rounding is the identity for gradients, and they end where W is beyond the grid. Meant for Adam at 1e-5.

    Attributes:
        values: W, float32 ``[n, groups, g]``.
    """

    values: nn.Parameter

    def __init__(self, packed: PackedTensor) -> None:
        """Args:
            packed: one matrix.

        Raises:
            RoundingError: as :class:`LearnedWeight`.
        """
        super().__init__(decode(packed), packed.spec, packed)
        self.values = nn.Parameter(self.weight.clone())

    def forward(self) -> Tensor:
        return self.ungrouped(quantize(self.values, None, self.base_scale, self.base_zero_point, self.levels))

    def final(self) -> tuple[Tensor, Grid]:
        index = nearest(self.values.detach(), None, self.base_scale, self.base_zero_point, self.levels)
        return index, Grid(self.base_scale, self.base_zero_point)

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": [self.values], "lr_scale": 1.0}]
