"""Fine-tuning a packed language model with LoRA, from a file of texts to a saved adapter: the simple case."""

from hf_lowbit.finetuning.run import finetune
from hf_lowbit.finetuning.settings import FinetuneSettings

__all__ = ["FinetuneSettings", "finetune"]
