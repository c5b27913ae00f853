"""Quamba2Config."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from hf_lowbit.config import ConfigError, LowbitConfig, MethodName
from hf_lowbit.formats.spec import GroupSize
from hf_lowbit.nn import LayerSpec, MixerSpec
from hf_lowbit.plan import PlanError
from hf_lowbit.plan.patterns import first_match

CLUSTERS = 4  # of either kind
_AUTO = "auto"
_SMALL = ("conv1d", "dt_proj")
_OPTIONS = {
    "clustering": ("optimal", "kmeans"),
    "statistic": ("mean_then_max", "max"),
    "weights": (None, "gptq", "nearest"),
}


@dataclass(kw_only=True, repr=False)
class Quamba2Config(LowbitConfig):
    """Quamba2 (arXiv 2503.22879): W8A8; W4A8 with bits=4; W4A16 with bits=4 and activation_bits=None.

    Embeddings, head, norms and whatever else is no part of a mixer stay in floats unless asked for. Single blocks may
    differ (W4AX): ``overrides={"layers.3": {"activation_bits": None}}``, which :func:`hf_lowbit.search_blocks` finds.

    Attributes:
        bits: 8 or 4, of the projections; what is small (convolution, dt_proj, A_log, D) has 8.
        group_size: "auto": 128 of 4 bits, as in the paper, and a scale per row of 8 [ours: finer than the paper's].
        activation_bits: 8, by stored scales, between the projections as well, with int8 states in the cache; or None.
        head_clusters, channel_clusters: m and c of a Mamba-2 mixer: in each state group, heads in m clusters, and in
            each of these channels in c, share a scale. None: 4, the paper's; both None: also fewer, where a state
            group has fewer heads. 1 and 1: a scale per state group. Mamba has none.
        group_scales: B and C of Mamba-2 have a scale per state group; False: one each.
        clustering: of channels: "optimal", or the authors' "kmeans", which may fail.
        statistic: of a channel's magnitude: the largest over samples of its mean |x| ("mean_then_max" [code]), or its
            largest |x| ("max", the paper's).
        rotate: rotate the residual stream of the model first by a random Hadamard matrix, exactly; it unties a tied
            head.
        weights: "gptq" or "nearest"; None: GPTQ below 8 bits.
        search_clip: search the clipping range of each group for the least error, weighted by the inputs' power with
            GPTQ; nearest codes of 8 bits do without [ours; the paper's grids cover the largest weight].
        damping: of GPTQ: share of the Hessian's mean diagonal that is added to its diagonal.
        seed: of the rotation.
    """

    quant_method: ClassVar[MethodName] = MethodName("lowbit_quamba2")  # type: ignore[misc]
    packs_mixers: ClassVar[bool] = True

    bits: int | None = 8
    group_size: GroupSize = _AUTO  # type: ignore[assignment]
    activation_bits: int | None = 8
    activation_static: bool = True
    head_clusters: int | None = None
    channel_clusters: int | None = None
    group_scales: bool = True
    clustering: str = "optimal"
    statistic: str = "max"
    rotate: bool = True
    weights: str | None = None
    search_clip: bool = True
    damping: float = 0.01

    def __post_init__(self) -> None:
        if self.group_size == _AUTO:
            self.group_size = 128 if self.bits == 4 else None
        if self.activation_bits is None and self.activation_format is None:
            self.activation_static = False
        super().__post_init__()
        self._check(self.bits in (4, 8), f"bits must be 8 or 4, not {self.bits!r}")
        quantizes = self.activation_bits is not None or self.activation_format is not None
        plain = self.activation_symmetric and self.activation_format in (None, "int")
        fits = self.activation_bits == 8 and self.activation_static and self.activation_group_size is None and plain
        self._check(
            fits or not quantizes, "inputs are symmetric integers of 8 bits with stored scales, or activation_bits=None"
        )
        for name, options in _OPTIONS.items():
            value = getattr(self, name)
            self._check(value in options, f"{name} must be {' or '.join(map(repr, options))}, not {value!r}")
        for name in ("head_clusters", "channel_clusters"):
            value = getattr(self, name)
            positive = value is None or (type(value) is int and value > 0)
            self._check(positive, f"{name} must be a positive integer or None, not {value!r}")
            self._check(value is None or quantizes, f"{name}={value} needs activation_bits=8")
        for name in ("group_scales", "rotate", "search_clip"):
            value = getattr(self, name)
            self._check(type(value) is bool, f"{name} must be True or False, not {value!r}")
        is_number = type(self.damping) in (int, float)
        self._check(
            is_number and 0 < self.damping <= 10, f"damping must lie above 0 and not above 10: {self.damping!r}"
        )

    def _check(self, holds: bool, problem: str) -> None:
        if not holds:
            raise ConfigError(f"Quamba2Config: {problem}")

    def layer_spec(self, name: str) -> LayerSpec:
        """As of every method; what is small has 8 bits, unless an override gives its bits."""
        spec = super().layer_spec(name)
        pattern = first_match(self.overrides or (), name)
        is_given = bool(self.overrides and pattern and "bits" in self.overrides[pattern])
        if is_given or name.rpartition(".")[2] not in _SMALL or spec.weight.bits >= 8:
            return spec
        return replace(spec, weight=replace(spec.weight, bits=8, group_size=None))

    def mixer_spec(self, name: str, kind: str) -> MixerSpec:
        """How the mixer called ``name`` computes, of the kind "mamba" or "mamba2".

        Raises:
            PlanError: clusters for a mixer of Mamba, or inputs whose scales are made as they come.
        """
        clusters = {"head_clusters": self.head_clusters, "channel_clusters": self.channel_clusters}
        asked = {field: value for field, value in clusters.items() if value is not None}
        if kind != "mamba2" and asked:
            values = ", ".join(f"{field}={value}" for field, value in asked.items())
            raise PlanError(f"{name} is a mixer of Mamba, whose channels have no heads: leave {values} out")
        activation = self.layer_spec(name).activation
        if activation is None:
            return MixerSpec()
        if not activation.static:
            raise PlanError(f"{name}: what a mixer computes has stored scales: give activation_static=True as well")
        if kind != "mamba2":
            return MixerSpec(activation_bits=8, state_bits=8, channel_states=True)
        heads, channels = (value or CLUSTERS if asked else None for value in clusters.values())
        return MixerSpec(8, 8, self.group_scales, heads, channels)
