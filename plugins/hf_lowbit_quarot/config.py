"""QuaRotConfig."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hf_lowbit.config import ConfigError, LowbitConfig, MethodName

_WEIGHTS = ("gptq", "nearest")


@dataclass(kw_only=True, repr=False)
class QuaRotConfig(LowbitConfig):
    """QuaRot (arXiv 2404.00456): W4A4 with symmetric weights, one scale per output row and one per token.

    Attributes:
        activation_bits: 4, 6 or 8; None quantizes weights only.
        weights: "gptq" or "nearest".
        search_clip: search each row's clipping range for the least error, weighted by the inputs' power with "gptq"
            [ours].
        damping: of "gptq": share of the Hessian's mean diagonal that is added to its diagonal.
        online: transform, each time a layer runs, inputs that the folded rotation does not reach. None: where they are
            quantized.
        seed: of the rotation.
    """

    quant_method: ClassVar[MethodName] = MethodName("lowbit_quarot")  # type: ignore[misc]

    bits: int | None = 4
    activation_bits: int | None = 4
    weights: str = "gptq"
    search_clip: bool = True
    damping: float = 0.01
    online: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weights not in _WEIGHTS:
            options = " or ".join(map(repr, _WEIGHTS))
            raise ConfigError(f"QuaRotConfig: weights must be {options}, not {self.weights!r}")
        if type(self.damping) not in (int, float) or not 0 < self.damping <= 10:
            raise ConfigError(f"QuaRotConfig: damping must lie above 0 and not above 10, not {self.damping!r}")
        if type(self.search_clip) is not bool:
            raise ConfigError(f"QuaRotConfig: search_clip must be True or False, not {self.search_clip!r}")
        if self.online is not None and type(self.online) is not bool:
            raise ConfigError(f"QuaRotConfig: online must be True, False or None, not {self.online!r}")
        quantizes = self.activation_bits is not None or self.activation_format is not None
        transforms = quantizes if self.online is None else self.online
        if transforms and self.low_rank is not None and self.low_rank.keep == "adapter":
            raise ConfigError(
                'QuaRotConfig: low_rank keep="adapter" would compute on inputs before they are rotated; use '
                'keep="branch"'
            )
