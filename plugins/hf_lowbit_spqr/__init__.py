"""SpQR: groups of 16 with scales of a few bits, and the single weights that matter most kept exact."""

from hf_lowbit.method import Method
from hf_lowbit_spqr.config import SpQRConfig

METHOD = Method(
    name="spqr",
    config_class=SpQRConfig,
    recipe="hf_lowbit_spqr.recipe:make_recipe",
    summary="GPTQ in groups of 16 with 3-bit scales, single weights kept exact: quality before speed, about 4.7 bits",
    paper="SpQR: A Sparse-Quantized Representation for Near-Lossless LLM Weight Compression (arXiv 2306.03078)",
    needs_data=True,
)

__all__ = ["METHOD", "SpQRConfig"]
