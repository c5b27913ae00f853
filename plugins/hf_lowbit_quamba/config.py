"""QuambaConfig."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hf_lowbit.config import ConfigError, LowbitConfig, MethodName
from hf_lowbit.formats.spec import GroupSize
from hf_lowbit.nn import MixerSpec
from hf_lowbit.plan import PlanError

# Everything between the projections has stored scales; what is made as inputs come would not fit them.
_FIXED = {"bits": 8, "activation_bits": 8, "activation_static": True, "activation_group_size": None}
_STATE_SCALES = ("tensor", "channel")


@dataclass(kw_only=True, repr=False)
class QuambaConfig(LowbitConfig):
    """Quamba (arXiv 2410.13229): W8A8 of Mamba's mixers, every scale stored, one per tensor.

    Embeddings, head, norms and whatever else is no part of a mixer stay in floats unless asked for, as in the paper.

    Attributes:
        percentile: of |x| that the scale of the scan's input covers, in percent (the paper's 99.999 [sec]; its code has
            99.95 for input and state). 100: the largest of all data, and nothing is clipped.
        state_percentile: that of the state in the cache, which counts when tokens come one by one.
        percentile_sigma: each sample's percentile enters a running mean with this weight (0.01 [code]), so that the
            first hundred samples decide; None: the percentile over all data, whatever their order [ours].
        state_scales: of the state: one per "tensor", the paper's, or per "channel" [ours], which loses far less where
            tokens come one by one and costs four bytes for each; the largest of all data then, and nothing is clipped.
        hadamard: multiply the scan's output by a Hadamard matrix before it is quantized, and the columns of the output
            projection by its inverse.
        rotate: rotate the residual stream of the model first by a random Hadamard matrix, exactly (a later addition
            [paper2]); it unties a tied head.
        any_generation: also take Mamba-2's mixers, where one scale per tensor is known to fail [paper2]: to compare.
    """

    quant_method: ClassVar[MethodName] = MethodName("lowbit_quamba")  # type: ignore[misc]
    packs_mixers: ClassVar[bool] = True

    bits: int | None = 8
    group_size: GroupSize = "tensor"
    activation_bits: int | None = 8
    activation_static: bool = True
    percentile: float = 99.999
    state_percentile: float = 99.95
    percentile_sigma: float | None = 0.01
    state_scales: str = "tensor"
    hadamard: bool = True
    rotate: bool = False
    any_generation: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in _FIXED.items():
            if getattr(self, name) != value:
                raise ConfigError(
                    f"QuambaConfig: {name} must be {value!r}, not {getattr(self, name)!r}; for single layers or blocks "
                    "use overrides, for 4-bit weights Quamba2Config"
                )
        if self.activation_format not in (None, "int") or not self.activation_symmetric:
            raise ConfigError("QuambaConfig: inputs are symmetric integers; leave activation_format and _symmetric out")
        for name, most in (("percentile", 100), ("state_percentile", 100), ("percentile_sigma", 1)):
            value = getattr(self, name)
            if value is None and name == "percentile_sigma":
                continue
            if type(value) not in (int, float) or not 0 < value <= most:
                raise ConfigError(f"QuambaConfig: {name} must lie above 0 and at most at {most}, not {value!r}")
        if self.state_scales not in _STATE_SCALES:
            options = " or ".join(map(repr, _STATE_SCALES))
            raise ConfigError(f"QuambaConfig: state_scales must be {options}, not {self.state_scales!r}")
        for name in ("hadamard", "rotate", "any_generation"):
            if type(getattr(self, name)) is not bool:
                raise ConfigError(f"QuambaConfig: {name} must be True or False, not {getattr(self, name)!r}")

    def mixer_spec(self, name: str, kind: str) -> MixerSpec:
        """How the mixer called ``name`` computes, of the kind "mamba" or "mamba2".

        Raises:
            PlanError: Mamba-2 without ``any_generation``, or inputs whose scales are made as they come.
        """
        if kind != "mamba" and not self.any_generation:
            raise PlanError(
                f"{name} is a mixer of Mamba-2, on which one scale per tensor is known to fail: use Quamba2Config, or "
                "any_generation=True to compare"
            )
        activation = self.layer_spec(name).activation
        if activation is None:
            return MixerSpec()
        if not activation.static:
            raise PlanError(f"{name}: what a mixer computes has stored scales, not activation_static=False")
        return MixerSpec(activation_bits=8, state_bits=8, channel_states=self.state_scales == "channel")
