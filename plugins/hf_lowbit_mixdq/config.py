"""MixDQConfig."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from hf_lowbit.config import ConfigError, LowbitConfig, MethodName


@dataclass(kw_only=True, repr=False)
class MixDQConfig(LowbitConfig):
    """MixDQ (arXiv 2405.17873): rows from their absolute maximum, inputs of 8 bits with a zero point.

    With data (prompts of a pipeline), every layer's inputs have one static scale, from their smallest to their largest
    value; without, each token has its own. Bits of single layers are ``overrides``, as ``hf-lowbit search`` finds them.

    Attributes:
        bos_aware: where the first token of the text is the same in all of the data, keys and values of
            cross-attention store its product and leave it out of their inputs' range. With scales per token there is
            nothing to gain.
        split_shortcuts: layers that read a concatenation have scales of their own for each of its parts.
    """

    quant_method: ClassVar[MethodName] = MethodName("lowbit_mixdq")  # type: ignore[misc]

    bits: int | None = 8
    activation_bits: int | None = 8
    activation_symmetric: bool = False
    bos_aware: bool = True
    split_shortcuts: bool = True

    def __post_init__(self) -> None:
        if not self._quantizes_inputs:  # weights alone
            self.activation_symmetric = True
        super().__post_init__()
        for name in ("bos_aware", "split_shortcuts"):
            if type(getattr(self, name)) is not bool:
                raise ConfigError(f"MixDQConfig: {name} must be True or False, not {getattr(self, name)!r}")

    @property
    def _quantizes_inputs(self) -> bool:
        return self.activation_bits is not None or self.activation_format is not None

    def copy_with_data(self, data: Any, drawn: bool = False) -> LowbitConfig:
        """As of every config; with data, scales of inputs are static."""
        copied = super().copy_with_data(data, drawn)
        if not self._quantizes_inputs or not (drawn or copied.dataset is not None):
            return copied
        return replace(copied, activation_static=True)
