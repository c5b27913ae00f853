"""HQQ: zero points optimised without data, for weights with outliers."""

from hf_lowbit.method import Method
from hf_lowbit_hqq.config import HQQConfig

METHOD = Method(
    name="hqq",
    config_class=HQQConfig,
    recipe="hf_lowbit_hqq.recipe:make_recipe",
    summary="zero points by half-quadratic splitting: data-free, a minute; beats symmetric rtn at 4 bits and below",
    paper="Badri and Shaji, Half-Quadratic Quantization of Large Machine Learning Models (Mobius Labs, November 2023)",
)

__all__ = ["METHOD", "HQQConfig"]
