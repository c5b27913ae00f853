"""AWQ: scales that protect the input channels with the largest activations, and clipped ranges."""

from hf_lowbit.method import Method
from hf_lowbit_awq.config import AWQConfig

METHOD = Method(
    name="awq",
    config_class=AWQConfig,
    recipe="hf_lowbit_awq.recipe:make_recipe",
    summary="activation-aware scaling and clipping on calibration data, weights only; strong at 4 and 3 bits",
    paper="AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration (arXiv 2306.00978)",
    needs_data=True,
)

__all__ = ["METHOD", "AWQConfig"]
