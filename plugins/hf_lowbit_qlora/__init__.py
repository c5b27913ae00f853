"""QLoRA: NF4 weights with double-quantized scales, as the frozen base of LoRA."""

from hf_lowbit.method import Method
from hf_lowbit_qlora.config import QLoRAConfig

METHOD = Method(
    name="qlora",
    config_class=QLoRAConfig,
    recipe="hf_lowbit_qlora.recipe:make_recipe",
    summary="NF4 in groups of 64, scales as 8-bit codes: data-free, 4.13 bits; the usual base for LoRA",
    paper="QLoRA: Efficient Finetuning of Quantized LLMs (arXiv 2305.14314)",
)

__all__ = ["METHOD", "QLoRAConfig"]
