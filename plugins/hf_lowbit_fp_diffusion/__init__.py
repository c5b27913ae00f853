"""fp_diffusion: low-bit floating point, formats and clipping values searched, roundings of 4-bit weights learned."""

from hf_lowbit.method import Method
from hf_lowbit_fp_diffusion.config import FPDiffusionConfig

METHOD = Method(
    name="fp_diffusion",
    config_class=FPDiffusionConfig,
    recipe="hf_lowbit_fp_diffusion.recipe:make_recipe",
    summary="floating-point weights and inputs, split and clipping searched per layer, 4-bit roundings learned",
    paper="Low-Bitwidth Floating Point Quantization for Efficient High-Quality Diffusion Models (arXiv 2408.06995)",
    domains=("diffusion",),
    needs_data=True,
)

__all__ = ["METHOD", "FPDiffusionConfig"]
