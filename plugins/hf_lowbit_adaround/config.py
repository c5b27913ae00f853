"""AdaRoundConfig."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hf_lowbit.config import MethodName
from hf_lowbit.config_adaptive import AdaptiveConfig


@dataclass(kw_only=True, repr=False)
class AdaRoundConfig(AdaptiveConfig):
    """AdaRound, a whole block at a time: :class:`AdaptiveConfig` is all of it."""

    quant_method: ClassVar[MethodName] = MethodName("lowbit_adaround")  # type: ignore[misc,assignment]
