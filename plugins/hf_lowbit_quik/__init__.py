"""QUIK: 4-bit weights and inputs, with the input columns of outlier features in 16 bits."""

from hf_lowbit.method import Method
from hf_lowbit_quik.config import QUIKConfig

METHOD = Method(
    name="quik",
    config_class=QUIKConfig,
    recipe="hf_lowbit_quik.recipe:make_recipe",
    summary="4-bit weights and inputs with outlier columns in 16 bits, which absorb the others' rounding errors",
    paper="QUIK: Towards End-to-end 4-Bit Inference on Generative Large Language Models (arXiv 2310.09259)",
    needs_data=True,
)

__all__ = ["METHOD", "QUIKConfig"]
