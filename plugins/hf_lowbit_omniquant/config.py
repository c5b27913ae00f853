"""OmniQuantConfig."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from hf_lowbit.config import ConfigError, LowbitConfig, MethodName
from hf_lowbit.formats.spec import GroupSize


@dataclass(kw_only=True, repr=False)
class OmniQuantConfig(LowbitConfig):
    """OmniQuant (arXiv 2308.13137): learned clipping, and a learned equivalent transformation for quantized inputs.

    Asymmetric groups of 128 as in the paper's code.

    Attributes:
        epochs: passes over the calibration data per block. The authors take 20, at 2 bits 40; 0 leaves every range as
            training would start: slightly narrowed.
        learning_rate: of the clipping logits, for Adam; it falls linearly to zero.
        let: also learn scales, and shifts where biases allow, that are folded into norms and weights. None: in blocks
            whose inputs are quantized, as the paper does for LLaMA; for weights alone it is of use where norms have
            biases (OPT).
        let_learning_rate: of the scales' logarithms and of the shifts.
    """

    quant_method: ClassVar[MethodName] = MethodName("lowbit_omniquant")  # type: ignore[misc]

    group_size: GroupSize = 128
    symmetric: bool = False
    epochs: int = 20
    learning_rate: float = 0.01
    let: bool | None = None
    let_learning_rate: float = 0.005

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.epochs) is not int or self.epochs < 0:
            raise ConfigError(f"OmniQuantConfig: epochs must be an integer of at least 0, not {self.epochs!r}")
        for name in ("learning_rate", "let_learning_rate"):
            rate = getattr(self, name)
            if type(rate) not in (int, float) or not (math.isfinite(rate) and rate > 0):
                raise ConfigError(f"OmniQuantConfig: {name} must be a number above 0, not {rate!r}")
        if self.let is not None and type(self.let) is not bool:
            raise ConfigError(f"OmniQuantConfig: let must be True, False or None, not {self.let!r}")
