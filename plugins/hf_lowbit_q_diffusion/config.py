"""QDiffusionConfig."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar

from hf_lowbit.config import ConfigError, LowbitConfig, MethodName
from hf_lowbit.config_adaptive import AdaptiveConfig, check_split

_OF_INPUTS = ("activation_symmetric", "activation_static")


@dataclass(kw_only=True, repr=False)
class QDiffusionConfig(AdaptiveConfig):
    """Q-Diffusion (arXiv 2302.04304): W4A8, rows and inputs with zero points, one stored scale for each layer's input.

    ``bits=8`` is W8A8; ``activation_bits=None`` leaves inputs as they are (W4A16).

    Attributes:
        split: layers that read a concatenation, the shortcuts of a U-Net's decoder, have scales of their own for each
            part of it, of weights and of inputs.
        search_inputs: ranges of inputs with the least sum of |x - x_hat|^2.4 on the calibration data, as the authors
            have them for Stable Diffusion; False: from the smallest input to the largest.
    """

    quant_method: ClassVar[MethodName] = MethodName("lowbit_q_diffusion")  # type: ignore[misc,assignment]

    activation_bits: int | None = 8
    activation_symmetric: bool = False
    activation_static: bool = True
    split: bool = True
    search_inputs: bool = True

    def __post_init__(self) -> None:
        if self.activation_bits is None and self.activation_format is None:  # nothing of inputs is quantized
            defaults = {f.name: f.default for f in fields(LowbitConfig)}
            for name in _OF_INPUTS:
                setattr(self, name, defaults[name])
        super().__post_init__()
        for name in ("split", "search_inputs"):
            if type(getattr(self, name)) is not bool:
                raise ConfigError(f"QDiffusionConfig: {name} must be True or False, not {getattr(self, name)!r}")
        check_split(self, self.split)
        if self.search_inputs and self.activation_percentile != 100:
            raise ConfigError(
                f"QDiffusionConfig: activation_percentile={self.activation_percentile} is for ranges that are not "
                "searched: use search_inputs=False with it"
            )
