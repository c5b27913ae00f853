"""QuaRot: the model is rotated, so that neither weights nor inputs have outliers, before both are rounded."""

from hf_lowbit.method import Method
from hf_lowbit_quarot.config import QuaRotConfig

METHOD = Method(
    name="quarot",
    config_class=QuaRotConfig,
    recipe="hf_lowbit_quarot.recipe:make_recipe",
    summary="4-bit weights and inputs: random Hadamard rotations spread outliers, most of them folded into the weights",
    paper="QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs (arXiv 2404.00456)",
    needs_data=True,
)

__all__ = ["METHOD", "QuaRotConfig"]
