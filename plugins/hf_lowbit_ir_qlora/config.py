"""IRQLoRAConfig."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from hf_lowbit.config import ConfigError, LowbitConfig, MethodName
from hf_lowbit.formats.spec import GroupSize


@dataclass(kw_only=True, repr=False)
class IRQLoRAConfig(LowbitConfig):
    """IR-QLoRA's base weights (arXiv 2402.05445): NF4 with a shift per group, scales and shifts double quantized.

    ``format="int"`` is the authors' integer variant, which multiplies ranges instead of shifting. Layers that
    ``overrides`` give ``symmetric=True`` are rounded to nearest.

    Attributes:
        tau_range: the largest shift from a group's median, in deviations of normal weights; 0 leaves the median.
        tau_steps: shifts that are tried on either side of it.
        scale_bits: of the codes that scales and shifts are stored as; None: plain ones of ``scale_dtype``.
        scale_group: scales, of consecutive rows, that share an offset and a step.
    """

    quant_method: ClassVar[MethodName] = MethodName("lowbit_ir_qlora")  # type: ignore[misc]
    codes_scales: ClassVar[bool] = True

    format: str = "nf"
    group_size: GroupSize = 64
    symmetric: bool = False
    scale_bits: int | None = 8
    scale_group: int = 256
    tau_range: float = 0.1
    tau_steps: int = 100

    def __post_init__(self) -> None:
        if self.scale_bits is None:  # plain scales are not grouped
            self.scale_group = 16
        super().__post_init__()
        if self.symmetric:
            raise ConfigError(
                "IRQLoRAConfig: symmetric must be False: IR-QLoRA shifts each group, and the shift is a zero point; "
                "without it take method 'qlora'"
            )
        if type(self.tau_range) not in (int, float) or not (math.isfinite(self.tau_range) and self.tau_range >= 0):
            raise ConfigError(f"IRQLoRAConfig: tau_range must be a number >= 0, not {self.tau_range!r}")
        if type(self.tau_steps) is not int or self.tau_steps < 0:
            raise ConfigError(f"IRQLoRAConfig: tau_steps must be an integer >= 0, not {self.tau_steps!r}")
