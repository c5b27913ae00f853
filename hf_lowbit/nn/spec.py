"""LayerSpec: all that a packed module needs to be built again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hf_lowbit.formats import ActivationSpec, SpecError, WeightSpec
from hf_lowbit.nn.exact import ExactSpec
from hf_lowbit.nn.factors import check_factor_bits
from hf_lowbit.nn.state_space.spec import MixerSpec
from hf_lowbit.nn.transforms import TransformSpec

_FIELDS = ("weight", "activation", "low_rank", "factor_bits", "transform", "exact", "constant_token", "mixer")


@dataclass(frozen=True)
class LayerSpec:
    """One layer of a plan.

    Attributes:
        weight: format and granularity of its weights.
        activation: quantization of its input, or None for full precision.
        low_rank: rank of the branch that repairs the rounding error inside the layer, 0 for none.
        factor_bits: of the branch's factors: 16 (bfloat16), 8 or 4 (codes, a 16-bit scale per group of a rank's row).
        transform: of its input and output, around everything else (see :mod:`hf_lowbit.nn.transforms`), or None.
        exact: weights that stay floats beside the codes (see :mod:`hf_lowbit.nn.exact`), or None.
        constant_token: the product of a sequence's first token is stored (see :mod:`hf_lowbit.nn.constant_token`).
        mixer: how a state-space mixer computes between its projections; of the kinds of mixers, and only of these.
    """

    weight: WeightSpec
    activation: ActivationSpec | None = None
    low_rank: int = 0
    transform: TransformSpec | None = None
    exact: ExactSpec | None = None
    factor_bits: int = 16
    constant_token: bool = False
    mixer: MixerSpec | None = None

    def __post_init__(self) -> None:
        if type(self.low_rank) is not int or self.low_rank < 0:
            raise SpecError(f"low_rank must be an integer >= 0, not {self.low_rank!r}")
        check_factor_bits(self.factor_bits)
        if type(self.constant_token) is not bool:
            raise SpecError(f"constant_token must be True or False, not {self.constant_token!r}")
        if not self.low_rank and self.factor_bits != 16:  # equal layers have equal specifications
            object.__setattr__(self, "factor_bits", 16)

    def to_dict(self) -> dict[str, Any]:
        """Plain data; absent parts are left out."""
        values: dict[str, Any] = {"weight": self.weight.to_dict()}
        if self.activation is not None:
            values["activation"] = self.activation.to_dict()
        if self.low_rank:
            values["low_rank"] = self.low_rank
        if self.factor_bits != 16:
            values["factor_bits"] = self.factor_bits
        if self.transform is not None:
            values["transform"] = self.transform.to_dict()
        if self.exact is not None:
            values["exact"] = self.exact.to_dict()
        if self.constant_token:
            values["constant_token"] = True
        if self.mixer is not None:
            values["mixer"] = self.mixer.to_dict()
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LayerSpec:
        """Inverse of :meth:`to_dict`. Raises SpecError for unknown or missing fields."""
        if set(values) - set(_FIELDS) or "weight" not in values:
            raise SpecError(f"a layer of a plan has the fields {', '.join(_FIELDS)}; got {sorted(values)}")
        parts = ("activation", "transform", "exact", "mixer")
        activation, transform, exact, mixer = (values.get(name) for name in parts)
        return cls(
            WeightSpec.from_dict(values["weight"]),
            None if activation is None else ActivationSpec.from_dict(activation),
            values.get("low_rank", 0),
            None if transform is None else TransformSpec.from_dict(transform),
            None if exact is None else ExactSpec.from_dict(exact),
            values.get("factor_bits", 16),
            values.get("constant_token", False),
            None if mixer is None else MixerSpec.from_dict(mixer),
        )
