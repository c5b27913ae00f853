"""FPDiffusionConfig."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from hf_lowbit.config import ConfigError, MethodName
from hf_lowbit.config_adaptive import AdaptiveConfig
from hf_lowbit.nn import LayerSpec
from hf_lowbit.plan.patterns import first_match

if TYPE_CHECKING:
    from hf_lowbit.calibration.adaptive import AdaptiveTraining

# First and last layers, embedders of time, class and text, linear layers of adaptive norms: by diffusers' names.
_FIRST = re.compile(r"conv_in|pos_embed\.proj|x_embedder|patch_embedding")
_EDGES = re.compile(
    rf"{_FIRST.pattern}|conv_out|proj_out(_\d)?"
    r"|(.*\.)?(time_embedding|add_embedding|class_embedding|\w*_embedder|caption_projection|adaln_single)(\..*)?"
    r"|(.*\.)?time_text_embed\..*|(.*\.)?norm\w*\.linear"
)


@dataclass(kw_only=True, repr=False)
class FPDiffusionConfig(AdaptiveConfig):
    """Floating-point quantization of diffusion models (arXiv 2408.06995): FP4 weights, FP8 inputs.

    ``bits=8`` is W8A8, where nothing is trained; ``bits=6, activation_bits=6`` W6A6; ``activation_bits=None`` leaves
    inputs as they are. ``format="fp"`` searches the split of exponent and mantissa of each layer, "fp_eXmY" gives it,
    and so with ``activation_format``. With ``activation_static=False`` inputs take scales as they come, in the usual
    split of their width; without data as well, weights are searched and rounded to nearest, and nothing is calibrated.

    The paper has one scale per weight tensor [from a third party's summary]: ``group_size="tensor"``. Its iterations
    and rate are not known to us.

    Attributes:
        iterations: training steps per block, each on one batch; 0 rounds to nearest. Q-Diffusion, whose settings the
            paper builds on, takes 20,000; FP4DiT (arXiv 2503.15465) 2,500.
        learned_bits: roundings of weights of at most so many bits are learned; the paper learns those of FP4.
        scale_aware: learn logits in units of the distance between the two values around a weight (FP4DiT); the rate is
            then 1e-3 in runs of any length.
        search_clip: clipping values from 0.1 to 1.2 of the largest weight; False: the largest weight.
        activation_shift: inputs after SiLU or GELU take formats around a stored centre where that lowers their error.
        split: layers that read a concatenation, the shortcuts of a U-Net's decoder, have scales of their own for each
            part of it, of weights and of static inputs.
        edge_bits: of weights and inputs of the first and the last layers, of embedders and of the linear layers of
            adaptive norms, where they are not more anyway; overrides come first. A convention, of which the paper's
            share is not known to us; None: they are as the others.
        latent_bits: of the inputs of the first layers, the noisy latents themselves; None: full precision [ours]. What
            they lose a denoiser takes for noise: the README has a measurement.
    """

    quant_method: ClassVar[MethodName] = MethodName("lowbit_fp_diffusion")  # type: ignore[misc,assignment]
    searches_split: ClassVar[bool] = True
    _drawn = False  # no field: nothing of it is stored

    format: str = "fp"
    symmetric: bool = True
    activation_bits: int | None = 8
    activation_format: str | None = "fp"
    activation_static: bool = True
    activation_shift: bool = True
    learned_bits: int = 4
    scale_aware: bool = False
    split: bool = True
    edge_bits: int | None = 8
    latent_bits: int | None = None

    def __post_init__(self) -> None:
        if self.activation_bits is None:
            self.activation_format, self.activation_static = None, False
        if not self.activation_static or self.activation_format in (None, "int"):
            self.activation_shift = False
        super().__post_init__()
        for name in ("scale_aware", "split"):
            if type(getattr(self, name)) is not bool:
                raise ConfigError(f"FPDiffusionConfig: {name} must be True or False, not {getattr(self, name)!r}")
        for name in ("learned_bits", "edge_bits", "latent_bits"):
            value = getattr(self, name)
            if not (type(value) is int and 0 <= value <= 8) and not (name != "learned_bits" and value is None):
                raise ConfigError(f"FPDiffusionConfig: {name} must be an integer from 0 to 8, not {value!r}")
        for fields in (self._edge_fields(), self._first_fields()):
            self._layer_spec(fields)

    def layer_spec(self, name: str) -> LayerSpec:
        """As of every config; and layers at the edges of the model have ``edge_bits``."""
        if first_match(self.overrides or (), name) is not None or not _EDGES.fullmatch(name):
            return super().layer_spec(name)
        return self._layer_spec(self._first_fields() if _FIRST.fullmatch(name) else self._edge_fields())

    def copy_with_data(self, data: Any, drawn: bool = False) -> FPDiffusionConfig:
        """As of every config; it is remembered whether data will be drawn."""
        copied: FPDiffusionConfig = super().copy_with_data(data, drawn)  # type: ignore[assignment]
        copied._drawn = drawn
        return copied

    @property
    def calibrates(self) -> bool:
        """Whether there is data, or will have to be."""
        return self._drawn or self.dataset is not None or self.has_static_inputs

    @property
    def learns(self) -> bool:
        """Whether the roundings of any layer are learned."""
        given = [values.get("bits") for values in (self.overrides or {}).values()]
        widths = [bits for bits in (self.bits, *given) if bits is not None]
        return self.iterations > 0 and min(widths) <= self.learned_bits

    @property
    def rate(self) -> float:
        """The learning rate, the usual one where none is given."""
        return 1e-3 if self.scale_aware and self.learning_rate is None else super().rate

    def training(self, quantized_inputs: bool) -> AdaptiveTraining:
        """As of every adaptive config."""
        return replace(super().training(quantized_inputs), scale_aware=self.scale_aware)

    def _edge_fields(self) -> dict[str, Any]:
        """What is overridden of the layers at the edges."""
        fields: dict[str, Any] = {}
        for prefix in ("", "activation_"):
            bits, format = getattr(self, f"{prefix}bits"), getattr(self, f"{prefix}format")
            if self.edge_bits is not None and bits is not None and bits < self.edge_bits:
                fields[f"{prefix}bits"] = self.edge_bits
                if str(format).startswith(("fp", "ufp")):
                    fields[f"{prefix}format"] = "fp"
        return fields

    def _first_fields(self) -> dict[str, Any]:
        """The same of the first layers."""
        fields = self._edge_fields()
        if self.activation_bits is None:
            return fields
        if self.latent_bits is not None:
            floats = str(self.activation_format).startswith(("fp", "ufp"))
            format = {"activation_format": "fp"} if floats and self.latent_bits != self.activation_bits else {}
            return {**fields, **format, "activation_bits": self.latent_bits}
        return {**fields, "activation_bits": None, "activation_format": None, "activation_static": False}
