"""GPTQ: column by column, each column's rounding error made good by the columns after it."""

from hf_lowbit.method import Method
from hf_lowbit_gptq.config import GPTQConfig

METHOD = Method(
    name="gptq",
    config_class=GPTQConfig,
    recipe="hf_lowbit_gptq.recipe:make_recipe",
    summary="second-order rounding on calibration data: minutes, every number format; the standard at 4 and 3 bits",
    paper="GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers (arXiv 2210.17323)",
    needs_data=True,
)

__all__ = ["METHOD", "GPTQConfig"]
