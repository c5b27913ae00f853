"""QuIPConfig."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hf_lowbit.config import ConfigError, LowbitConfig, MethodName
from hf_lowbit.formats.spec import GroupSize


@dataclass(kw_only=True, repr=False)
class QuIPConfig(LowbitConfig):
    """QuIP (arXiv 2307.13304): integers of 2^bits levels around zero, one scale for a whole matrix.

    The seed draws the rotations too: it is stored, and a model of another seed is another model.

    Attributes:
        range_factor: end of the range, in root mean squares of the rotated weights, 2.4 in the authors' code; None
            searches the range of least error [ours].
        greedy_passes: over the columns after they were rounded, at most; with any, columns with the largest inputs are
            rounded first (the paper's LDLQ-RG).
        damping: share of the Hessian's mean diagonal that is added to its diagonal, after QuIP's own ridge of 1 %.
    """

    quant_method: ClassVar[MethodName] = MethodName("lowbit_quip")  # type: ignore[misc]

    bits: int | None = 4
    group_size: GroupSize = "tensor"
    symmetric: bool = False
    real_zero_point: bool = True
    range_factor: float | None = 2.4
    greedy_passes: int = 0
    damping: float = 0.01

    def __post_init__(self) -> None:
        if self.symmetric is True or self.format != "int":
            self.real_zero_point = False  # theirs are none, or real anyway
        super().__post_init__()
        factor = self.range_factor
        if factor is not None and (type(factor) not in (int, float) or not 0 < factor <= 100):
            raise ConfigError(
                f"QuIPConfig: range_factor must lie above 0 and not above 100, or be None, not {factor!r}"
            )
        if type(self.greedy_passes) is not int or self.greedy_passes < 0:
            raise ConfigError(f"QuIPConfig: greedy_passes must be an integer >= 0, not {self.greedy_passes!r}")
        if type(self.damping) not in (int, float) or not 0 < self.damping <= 10:
            raise ConfigError(f"QuIPConfig: damping must lie above 0 and not above 10, not {self.damping!r}")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"QuIPConfig: seed must lie between 0 and 2^32 - 1, not {self.seed!r}")
        if self.group_size == "tensor" and (self.quantize_embeddings or self.quantize_lm_head):
            raise ConfigError(
                "QuIPConfig: quantize_embeddings and quantize_lm_head need a group_size of None or a number: "
                "embeddings, and heads tied to them, are not rotated, and one scale for all of their rows is too coarse"
            )
