"""QUIKConfig."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

from hf_lowbit.config import ConfigError, LowbitConfig, MethodName
from hf_lowbit.nn import LayerSpec
from hf_lowbit.plan.patterns import check_patterns, first_match

_EIGHT_BITS = {"format": "int", "bits": 8, "activation_bits": 8, "activation_symmetric": True}


@dataclass(kw_only=True, repr=False)
class QUIKConfig(LowbitConfig):
    """QUIK (arXiv 2310.09259): W4A4 with asymmetric inputs, one scale per output row and one per token.

    Attributes:
        outliers: input columns of every layer that stay in 16 bits, those with the largest inputs: a count, or a share
            of the layer's inputs. The default share makes the authors' 256 of 4096 [ours: they take 256 throughout, or
            more in proportion for wider layers].
        threshold: layers whose largest |x| is not above it keep no columns.
        sensitive: names or regular expressions of layers that become W8A8, as the authors do with Llama's down_proj and
            Falcon's second MLP layer; the default also knows OPT's, Whisper's and GPT-2's name for it [ours]. An
            override that matches a layer goes first.
        damping: share of the Hessian's mean diagonal that is added to its diagonal.
        act_order: quantize the columns with the largest inputs first. The authors go from small to large.
        search_clip: search each row's clipping range.
    """

    quant_method: ClassVar[MethodName] = MethodName("lowbit_quik")  # type: ignore[misc]

    bits: int | None = 4
    activation_bits: int | None = 4
    activation_symmetric: bool = False
    outliers: int | float = 1 / 16
    threshold: float = 0.0
    sensitive: list[str] = field(default_factory=lambda: ["down_proj", "fc2", "dense_4h_to_h", "mlp.c_proj"])
    damping: float = 0.01
    act_order: bool = False
    search_clip: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.sensitive, list | tuple):
            raise ConfigError(
                f"QUIKConfig: sensitive must be a list of names or regular expressions, not {self.sensitive!r}"
            )
        self.sensitive = list(self.sensitive)
        super().__post_init__()
        try:
            check_patterns(self.sensitive)
        except ValueError as error:
            raise ConfigError(f"QUIKConfig: sensitive: {error}") from None
        if self.activation_bits is None and self.activation_format is None:
            raise ConfigError(
                "QUIKConfig: activation_bits must be set: columns are kept for inputs that are quantized; use gptq for "
                "weights alone"
            )
        is_share = type(self.outliers) is float and 0 <= self.outliers <= 1
        if not is_share and (type(self.outliers) is not int or self.outliers < 0):
            raise ConfigError(
                f"QUIKConfig: outliers must be a count (an integer) or a share between 0.0 and 1.0, "
                f"not {self.outliers!r}"
            )
        if not _is_number(self.threshold) or not 0 <= self.threshold < math.inf:
            raise ConfigError(f"QUIKConfig: threshold must be a number of at least 0, not {self.threshold!r}")
        if not _is_number(self.damping) or not 0 < self.damping <= 10:
            raise ConfigError(f"QUIKConfig: damping must lie above 0 and not above 10, not {self.damping!r}")
        for name in ("act_order", "search_clip"):
            if type(getattr(self, name)) is not bool:
                raise ConfigError(f"QUIKConfig: {name} must be True or False, not {getattr(self, name)!r}")

    def layer_spec(self, name: str) -> LayerSpec:
        """As any config's, with 8 bits for sensitive layers that no override names."""
        if first_match(self.sensitive, name) and not first_match(self.overrides or (), name):
            return self._layer_spec(_EIGHT_BITS)
        return super().layer_spec(name)

    def kept_columns(self, columns: int) -> int:
        """How many of a layer's input columns stay in 16 bits."""
        count = self.outliers if isinstance(self.outliers, int) else round(self.outliers * columns)
        return min(count, columns)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
