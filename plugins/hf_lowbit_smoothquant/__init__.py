"""SmoothQuant: activation outliers move into the weights, so that both can be integers."""

from hf_lowbit.method import Method
from hf_lowbit_smoothquant.config import SmoothQuantConfig

METHOD = Method(
    name="smoothquant",
    config_class=SmoothQuantConfig,
    recipe="hf_lowbit_smoothquant.recipe:make_recipe",
    summary="weights and inputs as 8-bit integers, input outliers folded into the weights first; integer products",
    paper="SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models (arXiv 2211.10438)",
    needs_data=True,
)

__all__ = ["METHOD", "SmoothQuantConfig"]
