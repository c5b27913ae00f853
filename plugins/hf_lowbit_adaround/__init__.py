"""AdaRound: every weight rounded up or down, learned block by block."""

from hf_lowbit.method import Method
from hf_lowbit_adaround.config import AdaRoundConfig

METHOD = Method(
    name="adaround",
    config_class=AdaRoundConfig,
    recipe="hf_lowbit_adaround.recipe:make_recipe",
    summary="each weight rounded up or down, learned block by block on ranges that stay; a baseline for 4 and 3 bits",
    paper="Up or Down? Adaptive Rounding for Post-Training Quantization (arXiv 2004.10568); BRECQ (arXiv 2102.05426)",
    needs_data=True,
)

__all__ = ["METHOD", "AdaRoundConfig"]
