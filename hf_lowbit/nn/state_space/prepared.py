"""What a mixer's forward reads of its parameters: decoded, and scales expanded to what the kernels take."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Prepared(NamedTuple):
    """All float32, but ``state_cluster``.

    Attributes:
        A: negative, ``[H, n]`` (generation 1) or ``[H]``.
        D: ``[H]``.
        dt_bias: ``[H]`` or None.
        weight, bias: of the convolution, ``[channels, taps]`` and ``[channels]`` or None.
        scales: of each site that has one, as :class:`hf_lowbit.kernels.Operand` takes it.
        conv_in, conv_out: of the convolution's input and output, ``[1]`` or ``[channels]``, or None.
        state_scale: ``[clusters, n]`` or ``[clusters, 1]``, or None.
        state_cluster: int32 ``[H * P]``, or None.
        reads_dt: dt_proj quantizes its inputs to their grid by itself.
    """

    A: Tensor
    D: Tensor
    dt_bias: Tensor | None
    weight: Tensor
    bias: Tensor | None
    scales: dict[str, Tensor]
    conv_in: Tensor | None
    conv_out: Tensor | None
    state_scale: Tensor | None
    state_cluster: Tensor | None = None
    reads_dt: bool = False

    @property
    def coded(self) -> tuple[bool, bool]:
        """Whether the cached states of convolution and recurrence are int8 codes."""
        return self.conv_in is not None, self.state_scale is not None
