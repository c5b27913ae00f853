"""IR-QLoRA: NF4 shifted per group so that its codes carry the most information, as the frozen base of LoRA."""

from hf_lowbit.method import Method
from hf_lowbit_ir_qlora.config import IRQLoRAConfig

METHOD = Method(
    name="ir_qlora",
    config_class=IRQLoRAConfig,
    recipe="hf_lowbit_ir_qlora.recipe:make_recipe",
    summary="NF4 with a shift per group for the largest entropy of its codes: data-free, 4.25 bits; a base for LoRA",
    paper="Accurate LoRA-Finetuning Quantization of LLMs via Information Retention (arXiv 2402.05445)",
)

__all__ = ["METHOD", "IRQLoRAConfig"]
