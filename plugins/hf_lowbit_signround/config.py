"""SignRoundConfig."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hf_lowbit.config import ConfigError, LowbitConfig, MethodName
from hf_lowbit.formats.spec import GroupSize
from hf_lowbit.training.optimizers import OPTIMIZERS

_STARTS = ("gptq", "clip", "nearest")


@dataclass(kw_only=True, repr=False)
class SignRoundConfig(LowbitConfig):
    """SignRound (arXiv 2309.05516), which AutoRound implements; started from GPTQ's codes [ours].

    Attributes:
        iterations: training steps per block, each on one batch of eight sequences; the paper's 200.
        learning_rate: of the shifts and ranges, at the start; None: 1 / iterations from the paper's start, half of it
            from the others, which have less way to go [ours].
        optimizer: "sign" (the paper's) or "adam".
        start: "gptq": GPTQ's codes on grids with searched clipping; "clip": those grids; "nearest": the plain grid, as
            in the paper.
        reach: how far a shift may go, in steps. The paper has 0.5, which keeps each code beside its weight; GPTQ's
            codes may lie further away, and need 1 [ours].
        rotate: rotate the residual stream of the model first by a random Hadamard matrix, exactly (QuaRot, arXiv
            2404.00456): fewer outliers among the weights. A tied output head becomes a tensor of its own.
    """

    quant_method: ClassVar[MethodName] = MethodName("lowbit_signround")  # type: ignore[misc]

    group_size: GroupSize = 128
    iterations: int = 200
    learning_rate: float | None = None
    optimizer: str = "sign"
    start: str = "gptq"
    reach: float = 1.0
    rotate: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.iterations) is not int or self.iterations < 1:
            raise ConfigError(f"SignRoundConfig: iterations must be a positive integer, not {self.iterations!r}")
        for name in ("learning_rate", "reach"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int | float) or isinstance(value, bool) or not value > 0):
                raise ConfigError(f"SignRoundConfig: {name} must be a positive number, not {value!r}")
        if type(self.rotate) is not bool:
            raise ConfigError(f"SignRoundConfig: rotate must be True or False, not {self.rotate!r}")
        if self.reach is None:
            raise ConfigError("SignRoundConfig: reach must be a positive number, not None")
        for name, allowed in (("optimizer", OPTIMIZERS), ("start", _STARTS)):
            if getattr(self, name) not in allowed:
                options = ", ".join(map(repr, allowed))
                raise ConfigError(f"SignRoundConfig: {name} must be one of {options}, not {getattr(self, name)!r}")

    @property
    def rate(self) -> float:
        """The learning rate, the usual one where none is given."""
        usual = (1.0 if self.start == "nearest" else 0.5) / self.iterations
        return usual if self.learning_rate is None else self.learning_rate
