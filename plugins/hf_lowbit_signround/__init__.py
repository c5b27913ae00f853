"""SignRound: rounding and ranges of a block's weights learned together by signed gradients."""

from hf_lowbit.method import Method
from hf_lowbit_signround.config import SignRoundConfig

METHOD = Method(
    name="signround",
    config_class=SignRoundConfig,
    recipe="hf_lowbit_signround.recipe:make_recipe",
    summary="rounding and clipping learned block by block from GPTQ's codes; ahead of GPTQ below 4 bits, slow",
    paper="Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs (arXiv 2309.05516)",
    needs_data=True,
)

__all__ = ["METHOD", "SignRoundConfig"]
