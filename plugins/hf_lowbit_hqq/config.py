"""HQQConfig."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from hf_lowbit.config import ConfigError, LowbitConfig, MethodName
from hf_lowbit.formats.spec import GroupSize


@dataclass(kw_only=True, repr=False)
class HQQConfig(LowbitConfig):
    """HQQ: 4-bit integers with real zero points, in groups of 64.

    Layers that ``overrides`` give another format, or ``symmetric=True``, are rounded to nearest.

    Attributes:
        iterations: steps of the optimisation; 0 is rounding to nearest.
        p: exponent of the loss |w - w_hat|_p, above 0 and not above 1.
        beta: weight of the splitting's quadratic term, in the units of the weights; above 0.
        kappa: what beta is multiplied by with each step, at least 1.
        search_scale: also try ranges shrunk by up to a half, at eleven times the cost [ours; the authors' second
            version searches scales too].
    """

    quant_method: ClassVar[MethodName] = MethodName("lowbit_hqq")  # type: ignore[misc]

    bits: int | None = 4
    group_size: GroupSize = 64
    symmetric: bool = False
    real_zero_point: bool = True
    iterations: int = 20
    p: float = 0.7
    beta: float = 10.0
    kappa: float = 1.01
    search_scale: bool = False

    def __post_init__(self) -> None:
        if self.format != "int":
            raise ConfigError(f"HQQConfig: format must be 'int', whose zero points HQQ optimises, not {self.format!r}")
        if self.symmetric is True:
            raise ConfigError(
                "HQQConfig: symmetric must be False: HQQ optimises zero points, and symmetric integers have none; "
                "for symmetric ones take another method, such as rtn"
            )
        super().__post_init__()
        if type(self.iterations) is not int or self.iterations < 0:
            raise ConfigError(f"HQQConfig: iterations must be an integer >= 0, not {self.iterations!r}")
        if not (_is_number(self.p) and 0 < self.p <= 1):
            raise ConfigError(f"HQQConfig: p must lie above 0 and not above 1, not {self.p!r}")
        if not (_is_number(self.beta) and self.beta > 0):
            raise ConfigError(f"HQQConfig: beta must be a number above 0, not {self.beta!r}")
        if not (_is_number(self.kappa) and self.kappa >= 1):
            raise ConfigError(f"HQQConfig: kappa must be a number of at least 1, not {self.kappa!r}")
        if type(self.search_scale) is not bool:
            raise ConfigError(f"HQQConfig: search_scale must be True or False, not {self.search_scale!r}")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
