"""Quamba: state-space models with everything between their projections in 8-bit integers, by stored scales."""

from hf_lowbit.method import Method
from hf_lowbit_quamba.config import QuambaConfig

METHOD = Method(
    name="quamba",
    config_class=QuambaConfig,
    recipe="hf_lowbit_quamba.recipe:make_recipe",
    summary="Mamba as 8-bit integers with one stored scale per tensor: the scan's input clipped, its output rotated",
    paper="Quamba: A Post-Training Quantization Recipe for Selective State Space Models (arXiv 2410.13229)",
    domains=("language", "state-space"),
    needs_data=True,
)

__all__ = ["METHOD", "QuambaConfig"]
