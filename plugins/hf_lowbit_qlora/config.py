"""QLoRAConfig."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hf_lowbit.config import LowbitConfig, MethodName
from hf_lowbit.formats.spec import GroupSize


@dataclass(kw_only=True, repr=False)
class QLoRAConfig(LowbitConfig):
    """QLoRA's base weights (arXiv 2305.14314): NF4, groups of 64, double quantization.

    All fields are :class:`hf_lowbit.config.LowbitConfig`'s, with the paper's defaults.

    Attributes:
        scale_bits: of the codes that scales are stored as; None: no double quantization, plain scales of
            ``scale_dtype``.
        scale_group: scales, of consecutive rows, that share an offset and a step.
    """

    quant_method: ClassVar[MethodName] = MethodName("lowbit_qlora")  # type: ignore[misc]
    codes_scales: ClassVar[bool] = True

    format: str = "nf"
    group_size: GroupSize = 64
    scale_bits: int | None = 8
    scale_group: int = 256

    def __post_init__(self) -> None:
        if self.scale_bits is None:  # plain scales are not grouped
            self.scale_group = 16
        super().__post_init__()
