"""ViDiTQConfig."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from hf_lowbit.config import ConfigError, LowbitConfig, MethodName
from hf_lowbit.plan.denoiser_names import EMBEDDERS, OUTPUT


@dataclass(kw_only=True, repr=False)
class ViDiTQConfig(LowbitConfig):
    """ViDiT-Q (arXiv 2406.02540): W8A8; rows and tokens from their smallest to their largest value, as they come.

    ``bits=4`` is the paper's W4A8. By default what embeds inputs and what makes the output stays float, as in the
    authors' code: ``modules_to_not_convert`` takes the place of that list.

    Attributes:
        alpha: of the balancing scale A^alpha / max|W|^(1 - alpha) of each channel.
        balance: whether channels are balanced; None: where weights have fewer than 8 bits, as in the authors' plans.
        rotate: a Hadamard transform spreads what is left of single channels over all, before the input is quantized.
    """

    quant_method: ClassVar[MethodName] = MethodName("lowbit_vidit_q")  # type: ignore[misc]

    bits: int | None = 8
    symmetric: bool = False
    activation_bits: int | None = 8
    activation_symmetric: bool = False
    modules_to_not_convert: list[str] | None = field(default_factory=lambda: [EMBEDDERS, OUTPUT])
    alpha: float = 0.3
    balance: bool | None = None
    rotate: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.activation_bits is None and self.activation_format is None:
            raise ConfigError(
                "ViDiTQConfig: activation_bits must be set: balancing helps inputs and harms weights; for weights "
                "alone take another method, such as q_diffusion"
            )
        if not isinstance(self.alpha, int | float) or isinstance(self.alpha, bool) or not 0 <= self.alpha <= 1:
            raise ConfigError(f"ViDiTQConfig: alpha must lie between 0 and 1, not {self.alpha!r}")
        if self.balance is not None and type(self.balance) is not bool:
            raise ConfigError(f"ViDiTQConfig: balance must be True, False or None, not {self.balance!r}")
        if type(self.rotate) is not bool:
            raise ConfigError(f"ViDiTQConfig: rotate must be True or False, not {self.rotate!r}")
