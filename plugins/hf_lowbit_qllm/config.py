"""QLLMConfig."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hf_lowbit.config import ConfigError, LowbitConfig, MethodName


@dataclass(kw_only=True, repr=False)
class QLLMConfig(LowbitConfig):
    """QLLM (arXiv 2310.08041): W4A4 with asymmetric weights, one scale per output row and one per token.

    Attributes:
        activation_bits: 4, 6 or 8; None quantizes weights only: nothing is reassembled then, because it is quantized
            inputs that outliers hurt, and the error correction alone remains.
        channel_ratio: channels that splitting may add at one site, at most, relative to all; 0.2 as in the authors'
            scripts, 0 reassembles nothing.
        search_steps: thresholds that are tried at each site, at most.
        lora_rank, lora_alpha: of the corrections, W + alpha / rank B A; they are fused before the codes are chosen.
        epochs: passes over the data that train them, each step on one batch; 0 leaves the correction out.
        learning_rate: of AdamW at the start, falling linearly to zero. The authors take 5e-4, or 1e-4 for some models.
        train_norms: train the blocks' norms too, as the authors do (weights and biases; group norms stay).
    """

    quant_method: ClassVar[MethodName] = MethodName("lowbit_qllm")  # type: ignore[misc]

    bits: int | None = 4
    symmetric: bool = False
    activation_bits: int | None = 4
    channel_ratio: float = 0.2
    search_steps: int = 32
    lora_rank: int = 4
    lora_alpha: float = 1.0
    epochs: int = 10
    learning_rate: float = 5e-4
    train_norms: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("search_steps", 1), ("lora_rank", 1), ("epochs", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ConfigError(f"QLLMConfig: {name} must be an integer of at least {least}, not {value!r}")
        for name in ("lora_alpha", "learning_rate"):
            value = getattr(self, name)
            if not _is_number(value) or not 0 < value < float("inf"):
                raise ConfigError(f"QLLMConfig: {name} must be a positive number, not {value!r}")
        if not _is_number(self.channel_ratio) or not 0 <= self.channel_ratio <= 1:
            raise ConfigError(f"QLLMConfig: channel_ratio must lie between 0 and 1, not {self.channel_ratio!r}")
        if type(self.train_norms) is not bool:
            raise ConfigError(f"QLLMConfig: train_norms must be True or False, not {self.train_norms!r}")
        if self.low_rank is not None and self.low_rank.keep == "adapter":
            raise ConfigError(
                'QLLMConfig: low_rank keep="adapter" would compute on inputs before they are reassembled; use '
                'keep="branch"'
            )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
