"""RTNConfig."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hf_lowbit.config import LowbitConfig, MethodName
from hf_lowbit.formats.spec import GroupSize


@dataclass(kw_only=True, repr=False)
class RTNConfig(LowbitConfig):
    """Round to nearest. All fields are :class:`hf_lowbit.config.LowbitConfig`'s; weights default to groups of 128."""

    quant_method: ClassVar[MethodName] = MethodName("lowbit_rtn")  # type: ignore[misc]
    codes_scales: ClassVar[bool] = True

    group_size: GroupSize = 128
