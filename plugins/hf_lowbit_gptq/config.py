"""GPTQConfig."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hf_lowbit.config import ConfigError, LowbitConfig, MethodName
from hf_lowbit.formats.spec import GroupSize


@dataclass(kw_only=True, repr=False)
class GPTQConfig(LowbitConfig):
    """GPTQ (arXiv 2210.17323).

    Attributes:
        damping: share of the Hessian's mean diagonal that is added to its diagonal (the paper's 1 %).
        act_order: quantize the columns with the largest inputs first. Codes stay in their places.
        static_groups: fit every group's grid to the original weights; False refits each group when it is reached, on
            weights that already carry the errors of the columns before (the paper's way). act_order needs True.
        search_clip: search each group's clipping range, errors weighted by the inputs' power [ours; the paper's code
            has an unweighted search, off by default]. False: grids reach to the largest weight, as in the paper; fewer
            seconds, and several times the loss at 4 bits and below.
        true_sequential: collect the inputs of later layers of a block again once the earlier ones are quantized.
        block_size: columns between two updates of all later ones; it changes speed, not the result.
        rotate: rotate the residual stream of the model first by a random Hadamard matrix, exactly (QuaRot, arXiv
            2404.00456): fewer outliers among the weights. A tied output head becomes a tensor of its own.
    """

    quant_method: ClassVar[MethodName] = MethodName("lowbit_gptq")  # type: ignore[misc]
    codes_scales: ClassVar[bool] = True

    group_size: GroupSize = 128
    damping: float = 0.01
    act_order: bool = False
    static_groups: bool = True
    search_clip: bool = True
    true_sequential: bool = False
    block_size: int = 128
    rotate: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.damping) not in (int, float) or not 0 < self.damping <= 10:
            raise ConfigError(f"GPTQConfig: damping must lie above 0 and not above 10, not {self.damping!r}")
        if type(self.block_size) is not int or self.block_size < 1:
            raise ConfigError(f"GPTQConfig: block_size must be a positive integer, not {self.block_size!r}")
        for name in ("act_order", "static_groups", "search_clip", "true_sequential", "rotate"):
            if type(getattr(self, name)) is not bool:
                raise ConfigError(f"GPTQConfig: {name} must be True or False, not {getattr(self, name)!r}")
        if self.act_order and not self.static_groups:
            raise ConfigError(
                "GPTQConfig: act_order=True needs static_groups=True: groups lie along the stored columns"
            )
