"""NUPESConfig."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hf_lowbit.config import ConfigError, LowbitConfig, MethodName


@dataclass(kw_only=True, repr=False)
class NUPESConfig(LowbitConfig):
    """PowerQuant's and NUPES' power tables: 4 bits, one scale per row.

    Layers that ``overrides`` give another format are rounded to nearest.

    Attributes:
        exponent: a of every layer's table sign(k) (|k| / qmax)^(1/a), above 0 and not above 4; None searches one for
            each layer.
    """

    quant_method: ClassVar[MethodName] = MethodName("lowbit_nupes")  # type: ignore[misc]
    searches_exponent: ClassVar[bool] = True

    format: str = "power"
    bits: int | None = 4

    def __post_init__(self) -> None:
        if self.format != "power":
            raise ConfigError(
                f"NUPESConfig: format must be 'power', whose exponent NUPES searches, not {self.format!r}; "
                "single layers can have another one (overrides)"
            )
        super().__post_init__()
