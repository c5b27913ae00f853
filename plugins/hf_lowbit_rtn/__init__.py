"""Round to nearest: the data-free baseline of every comparison."""

from hf_lowbit.method import Method
from hf_lowbit_rtn.config import RTNConfig

METHOD = Method(
    name="rtn",
    config_class=RTNConfig,
    recipe="hf_lowbit_rtn.recipe:make_recipe",
    summary="round to nearest: data-free, seconds, every number format; good at 8 bits, fair at 4, poor below",
    paper="the baseline of GPTQ (arXiv 2210.17323) and of the LLaMA3 study (arXiv 2404.14047)",
)

__all__ = ["METHOD", "RTNConfig"]
