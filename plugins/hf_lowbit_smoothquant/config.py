"""SmoothQuantConfig."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hf_lowbit.config import ConfigError, LowbitConfig, MethodName


@dataclass(kw_only=True, repr=False)
class SmoothQuantConfig(LowbitConfig):
    """SmoothQuant (arXiv 2211.10438): W8A8 with a scale per output row and one per token.

    The paper's levels (table 2 [recall]) are combinations of the fields that every method has: O1 is
    ``group_size="tensor"``, O3 that with ``activation_static=True``. O2, one scale for all tokens of a call, is not
    offered: results would depend on what else is in the batch.

    Attributes:
        alpha: how much of the inputs' range moves into the weights, 0 to 1. The authors take 0.5 for OPT and BLOOM,
            0.85 for Llama 2 and 3, 0.8 for Mistral.
    """

    quant_method: ClassVar[MethodName] = MethodName("lowbit_smoothquant")  # type: ignore[misc]

    bits: int | None = 8
    activation_bits: int | None = 8
    alpha: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.activation_bits is None and self.activation_format is None:
            raise ConfigError(
                "SmoothQuantConfig: activation_bits must be set: smoothing helps inputs and harms weights; "
                "for weights alone take another method, such as awq"
            )
        if not isinstance(self.alpha, int | float) or isinstance(self.alpha, bool) or not 0 <= self.alpha <= 1:
            raise ConfigError(f"SmoothQuantConfig: alpha must lie between 0 and 1, not {self.alpha!r}")
