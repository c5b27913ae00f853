"""LowbitConfig: the strict configuration that every method's config extends."""

from __future__ import annotations

import copy
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from typing import Any, ClassVar

from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_lowbit.config_parts import (
    ConfigError,
    LowRankConfig,
    TuningConfig,
    check_absorbs,
    check_activations,
    check_field_names,
)
from hf_lowbit.formats import SpecError, WeightSpec
from hf_lowbit.formats.activation import ACTIVATION_FIELDS, activation_of, inherited_fields
from hf_lowbit.formats.number_format import default_bits
from hf_lowbit.formats.spec import GroupSize
from hf_lowbit.kernels import why_not
from hf_lowbit.nn import LayerSpec, MixerSpec
from hf_lowbit.plan import PlanError, check_entries
from hf_lowbit.plan.patterns import check_patterns, first_match
from hf_lowbit.suggestion import suggest

__all__ = ["ConfigError", "LowRankConfig", "LowbitConfig", "MethodName", "TuningConfig"]

FORMAT_VERSION = 1
_FORMAT_FIELDS = (
    "format", "bits", "group_size", "symmetric", "scale_dtype", "packing", "exponent", "codebook", "real_zero_point",
    "scale_bits", "scale_group",
)  # fmt: skip
_RUNTIME_FIELDS = ("dataset",)  # never written: a config holds no data
_STORED_FIELDS = ("plan", "provenance")


class MethodName(str):
    """A quant_method: a plain string to transformers, with the ``.value`` that diffusers reads of an enum."""

    @property
    def value(self) -> str:
        """The plain string."""
        return str(self)


_PARTS = {"low_rank": LowRankConfig, "tuning": TuningConfig}  # fields that are configs themselves


@dataclass(kw_only=True, repr=False)
class LowbitConfig(QuantizationConfigMixin):
    """Fields that every method shares. Unknown and out-of-range fields raise :class:`ConfigError`.

    Attributes:
        format, bits, group_size, symmetric, scale_dtype, packing, exponent, codebook, real_zero_point, scale_bits,
            scale_group: the weights' number format and granularity (:class:`hf_lowbit.formats.WeightSpec`); bits=None
            takes the format's own width.
        activation_bits, activation_format: quantization of inputs: 4, 6 or 8 bits of "int" (the default format when
            bits are given), or "float8_e4m3fn", by default with a scale per token, made as it comes. None: full
            precision.
        activation_symmetric: False: "int" with a zero point per scale. An override with another format goes back to
            True.
        activation_group_size: g inputs share a scale; None: all of them.
        activation_static: scales of each layer's input are found on calibration data and stored.
        activation_timesteps: static ones for each timestep of a diffusion model that the data has.
        activation_shift: static ones of a floating-point format have a centre, too.
        activation_percentile: static scales cover this share of |input|, in percent, and clip the rest (Quamba, arXiv
            2410.13229); 100 covers the largest.
        quantize_embeddings, quantize_lm_head: also pack these; either one packs both where they are tied.
        modules_to_not_convert: names or regular expressions of modules that stay in full precision.
        overrides: {name or regular expression: {field: value}} for formats, activations and the rank ("low_rank", 0 for
            none) of single modules; the first pattern that matches counts.
        strict_groups: refuse groups that do not divide a layer's input instead of taking the largest divisor.
        low_rank: compensation of the rounding error, or None.
        tuning: end-to-end tuning of scales and norms after a method that calibrates, or None.
        backend: force a kernel backend, "reference" (torch), "cpu" (native), "triton" (NVIDIA GPUs) or "humming" (the
            same with another package where that is faster); None picks the best of ours for each product.
        dataset, num_samples, sequence_length, seed: calibration data, for methods that need it. The data itself is
            never stored.
        plan: the final plan as stored; set by quantization.
        provenance: what made the checkpoint (versions, source, data name, seed).
    """

    quant_method: ClassVar[MethodName] = MethodName("lowbit")  # type: ignore[misc,assignment]
    codes_scales: ClassVar[bool] = False  # whether the method fits its codes to scales that are codes too (scale_bits)
    searches_exponent: ClassVar[bool] = False  # whether the method finds the exponent of "power" where none is given
    searches_split: ClassVar[bool] = False  # whether it finds exponent and mantissa of "fp"
    fits_rank: ClassVar[bool] = False  # whether layers smaller than the rank go without a branch, and are not refused
    packs_mixers: ClassVar[bool] = False  # whether it quantizes state-space mixers as a whole, and nothing around them

    format: str = "int"
    bits: int | None = None
    group_size: GroupSize = None
    symmetric: bool = True
    scale_dtype: str = "bfloat16"
    packing: str = "dense"
    exponent: float | None = None
    codebook: list[float] | None = None
    real_zero_point: bool = False
    scale_bits: int | None = None
    scale_group: int = 16
    activation_bits: int | None = None
    activation_format: str | None = None
    activation_symmetric: bool = True
    activation_group_size: int | None = None
    activation_static: bool = False
    activation_timesteps: bool = False
    activation_shift: bool = False
    activation_percentile: float = 100.0
    quantize_embeddings: bool = False
    quantize_lm_head: bool = False
    modules_to_not_convert: list[str] | None = None
    overrides: dict[str, dict[str, Any]] | None = None
    strict_groups: bool = False
    low_rank: LowRankConfig | None = None
    tuning: TuningConfig | None = None
    backend: str | None = None
    dataset: Any = None
    num_samples: int = 128
    sequence_length: int = 512
    seed: int = 0
    plan: list[dict[str, Any]] | None = field(default=None)
    provenance: dict[str, Any] = field(default_factory=dict)

    def __new__(cls, *args: Any, **values: Any) -> LowbitConfig:
        """Refuse unknown fields by name before the dataclass' own error would."""
        check_field_names(cls, values)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for name, part in _PARTS.items():
            if isinstance(values := getattr(self, name), dict):
                check_field_names(part, values, name)
                setattr(self, name, part(**values))
        self._check_plain_fields()
        try:
            if self.bits is None:
                self.bits = default_bits(self.format, self.codebook)
            check_patterns((*(self.modules_to_not_convert or ()), *(self.overrides or ())))
            self._layer_spec({})
            for pattern, values in (self.overrides or {}).items():
                allowed = (*_FORMAT_FIELDS, *ACTIVATION_FIELDS, "low_rank")
                for name in sorted(set(values) - set(allowed)):
                    hint = suggest(name, allowed, "it can set")
                    raise ConfigError(f"overrides[{pattern!r}] cannot set {name}; {hint}")
                self._rank(values)
                self._layer_spec(values)
            if self.plan is not None:
                check_entries(self.plan)
        except (SpecError, PlanError, ValueError) as error:
            raise ConfigError(f"{type(self).__name__}: {error}") from None
        for name in ("codebook", "modules_to_not_convert"):  # as they come back from JSON
            if getattr(self, name) is not None:
                setattr(self, name, list(getattr(self, name)))

    def _check_plain_fields(self) -> None:
        names = self.modules_to_not_convert
        if names is not None and not isinstance(names, list | tuple):
            raise ConfigError(
                f"{type(self).__name__}: modules_to_not_convert must be a list of names or regular expressions, "
                f"not {names!r}"
            )
        given = {} if self.overrides is None else self.overrides
        if not isinstance(given, dict) or not all(isinstance(values, dict) for values in given.values()):
            raise ConfigError(
                f"{type(self).__name__}: overrides must be {{name or regular expression: {{field: value}}}}, "
                f"not {given!r}"
            )
        if not isinstance(self.provenance, dict):
            raise ConfigError(f"{type(self).__name__}: provenance must be a dictionary, not {self.provenance!r}")
        if type(self.seed) is not int:
            raise ConfigError(f"{type(self).__name__}: seed must be an integer, not {self.seed!r}")
        inputs = ("activation_symmetric", "activation_static", "activation_timesteps", "activation_shift")
        others = ("symmetric", "real_zero_point", "strict_groups", "quantize_embeddings", "quantize_lm_head")
        for name in (*inputs, *others):
            if type(getattr(self, name)) is not bool:
                raise ConfigError(f"{type(self).__name__}: {name} must be True or False, not {getattr(self, name)!r}")
        for name in ("num_samples", "sequence_length"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ConfigError(
                    f"{type(self).__name__}: {name} must be a positive integer, not {getattr(self, name)!r}"
                )
        check_activations(self)
        if reason := why_not(self.backend):
            raise ConfigError(f"{type(self).__name__}: {reason}")
        for name, part in _PARTS.items():
            value = getattr(self, name)
            if value is not None and not isinstance(value, part):
                raise ConfigError(f"{type(self).__name__}: {name} must be a {part.__name__}, not {value!r}")
        if self.tuning is not None and self.low_rank is not None and self.low_rank.keep == "adapter":
            raise ConfigError(
                f"{type(self).__name__}: tuning would train the model without its adapter; use low_rank keep='branch'"
            )

    @property
    def has_static_inputs(self) -> bool:
        """Whether inputs of any layer are quantized with a stored scale, which takes calibration data to find."""
        return self.activation_static or any(o.get("activation_static") for o in (self.overrides or {}).values())

    def layer_spec(self, name: str) -> LayerSpec:
        """The specification of the module called ``name``: the config's fields, then the first matching override's."""
        pattern = first_match(self.overrides or (), name)
        return self._layer_spec(self.overrides[pattern] if self.overrides and pattern else {})

    def mixer_spec(self, name: str, kind: str) -> MixerSpec:
        """How the state-space mixer called ``name`` computes ("mamba", "mamba2"), of a method that packs mixers."""
        return MixerSpec()

    def low_rank_of(self, name: str) -> int:
        """The rank that the config gives the module called ``name``, wherever it is kept; 0 for none."""
        pattern = first_match(self.overrides or (), name)
        return self._rank(self.overrides[pattern] if self.overrides and pattern else {})

    def adapter_rank(self, name: str) -> int:
        """The same where it is kept in an adapter, else 0."""
        return self.low_rank_of(name) if self.low_rank is not None and self.low_rank.keep == "adapter" else 0

    def _rank(self, overrides: dict[str, Any]) -> int:
        rank = overrides.get("low_rank", 0 if self.low_rank is None else self.low_rank.rank)
        if type(rank) is not int or rank < 0:
            raise ConfigError(f"low_rank of an override is a rank, an integer of at least 0, not {rank!r}")
        if rank and self.low_rank is None:
            raise ConfigError(
                f"an override has low_rank={rank}, and the config none: give it low_rank=LowRankConfig(...)"
            )
        return rank

    def _layer_spec(self, overrides: dict[str, Any]) -> LayerSpec:
        values = {name: getattr(self, name) for name in (*_FORMAT_FIELDS, *ACTIVATION_FIELDS)}
        if overrides.get("format", self.format) != self.format:  # parameters of another format do not carry over
            values.update(exponent=None, codebook=None, packing="dense", real_zero_point=False)
            values["bits"] = default_bits(overrides["format"], overrides.get("codebook"))
        if overrides.get("symmetric"):  # nor do those of a zero point without one
            values["real_zero_point"] = False
        if overrides.get("scale_bits", 0) is None:  # nor groups of scales where they are plain
            values["scale_group"] = 16
        values.update(inherited_fields(overrides))  # nor parts of how inputs are quantized
        values.update({name: value for name, value in overrides.items() if name != "low_rank"})
        if values["format"] == "int" and values["bits"] == 1 and not values["symmetric"]:
            values["real_zero_point"] = False  # that of one bit is real anyway
        activation = activation_of(*(values.pop(name) for name in ACTIVATION_FIELDS))
        kept = self.low_rank if self.low_rank is not None and self.low_rank.keep == "branch" else None
        rank, factor_bits = (0, 16) if kept is None else (self._rank(overrides), kept.factor_bits)
        weight = WeightSpec(**values)
        if self.low_rank is not None and self.low_rank.keep == "fused" and self._rank(overrides):
            check_absorbs(weight)
        if weight.scale_bits is not None and not self.codes_scales:
            raise SpecError(
                f"scale_bits={weight.scale_bits}: the method keeps its scales as they are; use scale_bits=None"
            )
        if weight.is_open and not (self.searches_split if weight.format == "fp" else self.searches_exponent):
            weight.number_format  # noqa: B018  raises: the method cannot complete it
        if activation is not None and activation.is_open and not self.searches_split:
            raise SpecError(
                "static inputs of format 'fp' need a method that searches exponent and mantissa, such as fp_diffusion; "
                "give activation_format='fp_eXmY'"
            )
        return LayerSpec(weight, activation, rank, factor_bits=factor_bits)

    def to_dict(self) -> dict[str, Any]:
        """What is stored: fields that differ from their defaults, format version and plan; never data."""
        values: dict[str, Any] = {"quant_method": str(self.quant_method), "format_version": FORMAT_VERSION}
        for f in fields(self):
            value = getattr(self, f.name)
            default = f.default_factory() if f.default_factory is not MISSING else f.default
            always = f.name in ("format", "bits", "group_size")
            if f.name not in _RUNTIME_FIELDS and (always or value != default):
                values[f.name] = (
                    asdict(value) if isinstance(value, LowRankConfig | TuningConfig) else copy.deepcopy(value)
                )
        return values

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Inverse of :meth:`to_dict`.

        Raises:
            ConfigError: unknown fields, another method's config, or a newer format version.
        """
        values = {**config_dict, **kwargs}
        method, version = values.pop("quant_method", cls.quant_method), values.pop("format_version", FORMAT_VERSION)
        if getattr(method, "value", method) != cls.quant_method:
            raise ConfigError(f"this is a config of {method!r}, not of {str(cls.quant_method)!r}")
        if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
            raise ConfigError(
                f"format_version={version!r} is not readable by this hf_lowbit, which reads up to {FORMAT_VERSION}; "
                "upgrade hf_lowbit"
            )
        config = cls(**values)
        return (config, {}) if return_unused_kwargs else config

    def to_diff_dict(self) -> dict[str, Any]:
        """The same as :meth:`to_dict`; diffusers calls it without defining it."""
        return self.to_dict()

    def __iter__(self) -> Any:
        yield from self.to_dict().items()

    def __deepcopy__(self, memo: dict[int, Any]) -> LowbitConfig:
        """A copy that shares the dataset: from_pretrained copies configs, data must not be."""
        return replace(self, plan=copy.deepcopy(self.plan, memo), provenance=copy.deepcopy(self.provenance, memo))

    def copy_with_data(self, data: Any, drawn: bool = False) -> LowbitConfig:
        """A copy for one run: with ``data`` as dataset (if given) and without an earlier run's plan.

        ``drawn``: data will come from a pipeline. A method that does without data may do more with it.
        """
        dataset = self.dataset if data is None else data
        return replace(self, dataset=dataset, plan=None, provenance=dict(self.provenance))

    def same_request(self, other: LowbitConfig) -> bool:
        """True when both ask for the same quantization, whatever their plans and provenance."""
        mine, theirs = self.to_dict(), other.to_dict()
        for name in _STORED_FIELDS:
            mine.pop(name, None)
            theirs.pop(name, None)
        return mine == theirs

    def __repr__(self) -> str:
        values = {
            k: v for k, v in self.to_dict().items() if k not in ("quant_method", "format_version", *_STORED_FIELDS)
        }
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in values.items())})"
