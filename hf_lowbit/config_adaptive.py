"""AdaptiveConfig: the fields that methods share which learn, block by block, whether weights go up or down."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_lowbit.config import ConfigError, LowbitConfig

if TYPE_CHECKING:
    from hf_lowbit.calibration.adaptive import AdaptiveTraining

_RATE = 1e-3  # the papers'
_TRAVEL = 2.5  # rate times iterations, at least: a rounding is decided at logits of -+2.4


@dataclass(kw_only=True, repr=False)
class AdaptiveConfig(LowbitConfig):
    """Rows with zero points, rounded as by AdaRound (arXiv 2004.10568), a block at a time (BRECQ, arXiv 2102.05426).

    Attributes:
        iterations: training steps per block, each on one batch. The papers take 20,000; 0 rounds to nearest within the
            searched ranges.
        learning_rate: of the rounding logits, for Adam; None: the papers' 1e-3, and 2.5 / iterations in runs of fewer
            than 2,500 steps, so that the logits can go as far as a decision needs [ours].
        regularization: lambda, the weight of the penalty on undecided roundings beside the error of the block's output,
            which is summed over channels.
        search_clip: ranges with the least sum of |w - w_hat|^2.4, as in BRECQ's code; False: from the smallest weight
            to the largest.
    """

    symmetric: bool = False
    iterations: int = 2500
    learning_rate: float | None = None
    regularization: float = 0.01
    search_clip: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        where = type(self).__name__
        if type(self.iterations) is not int or self.iterations < 0:
            raise ConfigError(f"{where}: iterations must be an integer of at least 0, not {self.iterations!r}")
        if self.learning_rate is not None and not (_is_number(self.learning_rate) and self.learning_rate > 0):
            raise ConfigError(f"{where}: learning_rate must be a number above 0, not {self.learning_rate!r}")
        if not (_is_number(self.regularization) and self.regularization >= 0):
            raise ConfigError(f"{where}: regularization must be a number from 0 up, not {self.regularization!r}")
        if type(self.search_clip) is not bool:
            raise ConfigError(f"{where}: search_clip must be True or False, not {self.search_clip!r}")

    @property
    def rate(self) -> float:
        """The learning rate, the usual one where none is given."""
        return max(_RATE, _TRAVEL / max(1, self.iterations)) if self.learning_rate is None else self.learning_rate

    def training(self, quantized_inputs: bool) -> AdaptiveTraining:
        """What a block is trained with; ``quantized_inputs``: whether its layers read quantized inputs meanwhile."""
        from hf_lowbit.calibration.adaptive import AdaptiveTraining  # registering methods imports no algorithm

        return AdaptiveTraining(self.iterations, self.rate, self.regularization, quantized_inputs)


def check_split(config: LowbitConfig, split: bool) -> None:
    """Raise ConfigError for a format that cannot be fitted to each part of a split weight."""
    if split and config.format == "codebook" and config.codebook is None:
        raise ConfigError(
            f"{type(config).__name__}: split=True rounds the parts of a weight each by itself, which a fitted codebook "
            "cannot: give codebook=[...], another format, or split=False"
        )


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]
