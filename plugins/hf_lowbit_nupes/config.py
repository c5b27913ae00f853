"""NUPESConfig."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from hf_lowbit.config import ConfigError, LowbitConfig, MethodName

_RATE = 1e-3  # of long runs
_TRAVEL = 1.0  # rate times iterations, at least


@dataclass(kw_only=True, repr=False)
class NUPESConfig(LowbitConfig):
    """PowerQuant's and NUPES' power tables: 4 bits, one scale per row.

    Layers that ``overrides`` give another format are rounded to nearest.

    Attributes:
        exponent: a of every layer's table sign(k) (|k| / qmax)^(1/a), above 0 and not above 4; None searches one for
            each layer. With ``learn`` a searched one is learned further, between 0.2 and 1, and a given one stays.
        learn: NUPES' second half: codes and exponents are trained block by block on calibration data.
        iterations: of ``learn``, training steps per block, each on one batch. 10,000 and more are usual for such
            training; 0 leaves the searched tables and the nearest codes.
        learning_rate: of the codes, for Adam, in codes per step; exponents have a tenth of it. None: 1e-3, and
            1 / iterations in runs of fewer than 1,000 steps, so that their codes can cross one too [ours].
        regularization: lambda, the weight of the penalty on undecided codes beside the error of the block's output,
            which is summed over channels.
        learn_scale: of ``learn``, whether the magnitude of each row's last code is trained as well, from that of
            ``search_clip``; False: it stays.
        search_clip: of ``learn``, rows start from ranges with the least sum of |w - w_hat|^2.4 [ours]; False: from
            their largest magnitude.
    """

    quant_method: ClassVar[MethodName] = MethodName("lowbit_nupes")  # type: ignore[misc]
    searches_exponent: ClassVar[bool] = True

    format: str = "power"
    bits: int | None = 4
    learn: bool = False
    iterations: int = 2500
    learning_rate: float | None = None
    regularization: float = 0.01
    learn_scale: bool = True
    search_clip: bool = True

    def __post_init__(self) -> None:
        if self.format != "power":
            raise ConfigError(
                f"NUPESConfig: format must be 'power', whose exponent NUPES searches, not {self.format!r}; "
                "single layers can have another one (overrides)"
            )
        super().__post_init__()
        for name in ("learn", "learn_scale", "search_clip"):
            if type(getattr(self, name)) is not bool:
                raise ConfigError(f"NUPESConfig: {name} must be True or False, not {getattr(self, name)!r}")
        if self.learn and not self.symmetric:
            raise ConfigError("NUPESConfig: learn=True needs symmetric=True: tables with a zero point are not learned")
        if type(self.iterations) is not int or self.iterations < 0:
            raise ConfigError(f"NUPESConfig: iterations must be an integer of at least 0, not {self.iterations!r}")
        if self.learning_rate is not None and not (_is_number(self.learning_rate) and self.learning_rate > 0):
            raise ConfigError(f"NUPESConfig: learning_rate must be a number above 0, not {self.learning_rate!r}")
        if not (_is_number(self.regularization) and self.regularization >= 0):
            raise ConfigError(f"NUPESConfig: regularization must be a number from 0 up, not {self.regularization!r}")

    @property
    def rate(self) -> float:
        """The learning rate, the usual one where none is given."""
        return max(_RATE, _TRAVEL / max(1, self.iterations)) if self.learning_rate is None else self.learning_rate


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]
