"""SpQRConfig."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hf_lowbit.config import ConfigError, LowbitConfig, MethodName
from hf_lowbit.formats.spec import GroupSize


@dataclass(kw_only=True, repr=False)
class SpQRConfig(LowbitConfig):
    """SpQR (arXiv 2306.03078): the authors' near-lossless setting at 4 bits, and at 3.

    Attributes:
        scale_bits: of the codes that scales and zero points are stored as; None: plain ones, of 16 bits each.
        outlier_threshold: weights whose error exceeds this share of the mean weighted variance stay exact; None: none.
        damping: share of the Hessian's mean diagonal that is added to its diagonal. The threshold of 0.2 is meant for
            the authors' 1.0: whoever changes one has to choose the other anew.
        act_order: quantize the columns with the largest inputs first, all grids fitted to the original weights; False:
            in the stored order, each group fitted when it is reached [ours: the authors permute the columns].
        leave_one_out: fit each grid without the weights that spoil it for the others.
        block_size: columns between two updates of all later ones; it changes speed, not the result.
    """

    quant_method: ClassVar[MethodName] = MethodName("lowbit_spqr")  # type: ignore[misc]
    codes_scales: ClassVar[bool] = True

    group_size: GroupSize = 16
    symmetric: bool = False
    real_zero_point: bool = True
    scale_bits: int | None = 3
    outlier_threshold: float | None = 0.2
    damping: float = 1.0
    act_order: bool = True
    leave_one_out: bool = True
    block_size: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.format != "int" or self.bits == 1 or self.symmetric:
            raise ConfigError(
                "SpQRConfig: SpQR rounds to integers of 2 to 8 bits with zero points (format='int', symmetric=False); "
                "for other formats take method 'gptq'"
            )
        threshold = self.outlier_threshold
        if threshold is not None and not (_is_number(threshold) and 0 < threshold < float("inf")):
            raise ConfigError(
                f"SpQRConfig: outlier_threshold must be a positive number, or None for no outliers, not {threshold!r}"
            )
        if not _is_number(self.damping) or not 0 < self.damping <= 10:
            raise ConfigError(f"SpQRConfig: damping must lie above 0 and not above 10, not {self.damping!r}")
        if type(self.block_size) is not int or self.block_size < 1:
            raise ConfigError(f"SpQRConfig: block_size must be a positive integer, not {self.block_size!r}")
        for name in ("act_order", "leave_one_out"):
            if type(getattr(self, name)) is not bool:
                raise ConfigError(f"SpQRConfig: {name} must be True or False, not {getattr(self, name)!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
