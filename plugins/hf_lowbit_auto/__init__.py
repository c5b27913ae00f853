"""auto: one number, bits per weight, and the suite's strongest parts composed for it."""

from hf_lowbit.method import Method
from hf_lowbit_auto.config import AutoLowbitConfig

METHOD = Method(
    name="auto",
    config_class=AutoLowbitConfig,
    recipe="hf_lowbit_auto.recipe:make_recipe",
    summary="give a budget of bits per weight: rotation, bits and formats per layer, rounding and tuning are chosen",
    paper="a composition [ours] of GPTQ, SignRound, QuaRot's rotation and EfficientQAT's tuning",
    needs_data=True,
)

__all__ = ["METHOD", "AutoLowbitConfig"]
