"""MixDQ: few-step diffusion models with the begin-of-sequence token set apart, and bits that a search chose."""

from hf_lowbit.method import Method
from hf_lowbit_mixdq.config import MixDQConfig

METHOD = Method(
    name="mixdq",
    config_class=MixDQConfig,
    recipe="hf_lowbit_mixdq.recipe:make_recipe",
    summary="W8A8 and W4A8 of text-to-image models: the begin-of-sequence token apart, bits per layer from a search",
    paper="MixDQ: Memory-Efficient Few-Step Text-to-Image Diffusion Models with Metric-Decoupled Mixed Precision "
    "Quantization (arXiv 2405.17873)",
    domains=("diffusion",),
)

__all__ = ["METHOD", "MixDQConfig"]
