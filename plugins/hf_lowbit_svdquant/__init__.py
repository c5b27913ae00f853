"""SVDQuant: outliers move into the weights, and from there into a low-rank branch beside 4-bit codes."""

from hf_lowbit.method import Method
from hf_lowbit_svdquant.config import SVDQuantConfig

METHOD = Method(
    name="svdquant",
    config_class=SVDQuantConfig,
    recipe="hf_lowbit_svdquant.recipe:make_recipe",
    summary="smoothing, a 16-bit low-rank branch and 4-bit codes of the rest, for 4-bit weights and 4-bit inputs",
    paper="SVDQuant: Absorbing Outliers by Low-Rank Components for 4-Bit Diffusion Models (arXiv 2411.05007)",
    needs_data=True,
)

__all__ = ["METHOD", "SVDQuantConfig"]
