"""AutoLowbitConfig."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from hf_lowbit.config import ConfigError, LowbitConfig, MethodName, TuningConfig
from hf_lowbit.formats.spec import GroupSize

_EFFORTS = ("fast", "best")
_FORMATS = ("int", "lloyd")
_FEW_BITS = 2.5  # with fewer most layers have two, where SignRound gains most


@dataclass(kw_only=True, repr=False)
class AutoLowbitConfig(LowbitConfig):
    """What to take when no method was chosen.

    Attributes:
        bits_per_weight: the most that may be stored for the quantized layers, scales included: an integer program gives
            every layer its bits. None: ``bits`` everywhere.
        effort: "fast": GPTQ on a rotated model; "best": SignRound from GPTQ's codes, minutes more; None: "best" where
            fewer than 2.5 bits per weight are asked for, "fast" otherwise.
        iterations: of SignRound, per block.
        rotate: rotate the residual stream first; None: with GPTQ, which gains by it. SignRound did not.
        formats: what a layer of 2 to 4 bits may become, by the least error weighted with its inputs: "int", or "lloyd",
            levels for normal weights, at the same size and speed. Other programs read integers only.
        candidates: bits that the integer program chooses from.
        tuning: of scales and norms in the end; None leaves it out. The default has two passes over the data, one where
            blocks are trained, and is left out where low_rank keeps an adapter.
    """

    quant_method: ClassVar[MethodName] = MethodName("lowbit_auto")  # type: ignore[misc]

    group_size: GroupSize = 64
    bits_per_weight: float | None = None
    effort: str | None = None
    iterations: int = 20
    rotate: bool | None = None
    formats: list[str] = field(default_factory=lambda: list(_FORMATS))
    candidates: list[int] = field(default_factory=lambda: [2, 3, 4, 8])
    tuning: TuningConfig | None = field(default_factory=TuningConfig)

    def __post_init__(self) -> None:
        is_default = self.tuning == TuningConfig()
        if self.low_rank is not None and is_default:
            keep = self.low_rank.get("keep") if isinstance(self.low_rank, dict) else getattr(self.low_rank, "keep", "")
            self.tuning = None if keep == "adapter" else self.tuning  # it would train without the adapter
        super().__post_init__()
        budget = self.bits_per_weight
        if budget is not None and (type(budget) not in (int, float) or not 1 <= budget <= 16):
            raise ConfigError(f"AutoLowbitConfig: bits_per_weight must lie between 1 and 16, not {budget!r}")
        if self.effort is not None and self.effort not in _EFFORTS:
            raise ConfigError(f"AutoLowbitConfig: effort must be 'fast', 'best' or None, not {self.effort!r}")
        if type(self.iterations) is not int or self.iterations < 1:
            raise ConfigError(f"AutoLowbitConfig: iterations must be a positive integer, not {self.iterations!r}")
        if self.rotate is not None and type(self.rotate) is not bool:
            raise ConfigError(f"AutoLowbitConfig: rotate must be True, False or None, not {self.rotate!r}")
        for name, allowed in (("formats", _FORMATS), ("candidates", range(1, 9))):
            given = getattr(self, name)
            if not isinstance(given, list | tuple) or not given or not all(value in allowed for value in given):
                raise ConfigError(f"AutoLowbitConfig: {name} must be some of {list(allowed)}, not {given!r}")
            setattr(self, name, list(given))
        if is_default and self.tuning is not None and self.trains_blocks:
            self.tuning = TuningConfig(epochs=1)

    @property
    def trains_blocks(self) -> bool:
        """Whether blocks are trained by SignRound, not only rounded by GPTQ."""
        if self.effort is not None:
            return self.effort == "best"
        asked = self.bits if self.bits_per_weight is None else self.bits_per_weight
        return asked is not None and asked < _FEW_BITS

    @property
    def rotates(self) -> bool:
        """Whether the model is rotated first."""
        return not self.trains_blocks if self.rotate is None else self.rotate
