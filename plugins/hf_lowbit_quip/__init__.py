"""QuIP: weights and Hessian made incoherent by random rotations, then rounded with linear feedback."""

from hf_lowbit.method import Method
from hf_lowbit_quip.config import QuIPConfig

METHOD = Method(
    name="quip",
    config_class=QuIPConfig,
    recipe="hf_lowbit_quip.recipe:make_recipe",
    summary="2 to 4 bits with one scale per matrix: inputs and outputs are rotated at random, then GPTQ's rounding",
    paper="QuIP: 2-Bit Quantization of Large Language Models With Guarantees (arXiv 2307.13304)",
    needs_data=True,
)

__all__ = ["METHOD", "QuIPConfig"]
