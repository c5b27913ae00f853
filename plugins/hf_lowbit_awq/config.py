"""AWQConfig."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from hf_lowbit.config import ConfigError, LowbitConfig, MethodName
from hf_lowbit.formats.spec import GroupSize
from hf_lowbit.plan.patterns import check_patterns

_QUERIES_AND_KEYS = r"(.*\.)?[^.]*(q_|k_|query|key|Wqkv|to_q|to_k)[^.]*"  # in the layer's own name, not its block's


@dataclass(kw_only=True, repr=False)
class AWQConfig(LowbitConfig):
    """AWQ (arXiv 2306.00978). Asymmetric groups of 128 as in the paper's code.

    Attributes:
        scale_steps: ratios that the search of each scale tries; 1 leaves out the scaling.
        clip: search each group's clipping range.
        never_clip: names or regular expressions of layers whose ranges are left whole; queries and keys, as in the
            authors' code.
    """

    quant_method: ClassVar[MethodName] = MethodName("lowbit_awq")  # type: ignore[misc]

    group_size: GroupSize = 128
    symmetric: bool = False
    scale_steps: int = 20
    clip: bool = True
    never_clip: list[str] = field(default_factory=lambda: [_QUERIES_AND_KEYS])

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.scale_steps) is not int or self.scale_steps < 1:
            raise ConfigError(f"AWQConfig: scale_steps must be a positive integer, not {self.scale_steps!r}")
        if type(self.clip) is not bool:
            raise ConfigError(f"AWQConfig: clip must be True or False, not {self.clip!r}")
        if not isinstance(self.never_clip, list | tuple):
            raise ConfigError(f"AWQConfig: never_clip must be a list of names, not {self.never_clip!r}")
        try:
            check_patterns(self.never_clip)
        except ValueError as error:
            raise ConfigError(f"AWQConfig: never_clip: {error}") from None
        self.never_clip = list(self.never_clip)
