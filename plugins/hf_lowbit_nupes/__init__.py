"""NUPES: levels that follow a power of the weights, searched without data as PowerQuant does, or learned."""

from hf_lowbit.method import Method
from hf_lowbit_nupes.config import NUPESConfig

METHOD = Method(
    name="nupes",
    config_class=NUPESConfig,
    recipe="hf_lowbit_nupes.recipe:make_recipe",
    summary="power-function levels, the exponent searched per layer without data, or learned; for one scale per row",
    paper="PowerQuant (arXiv 2301.09858) and NUPES (arXiv 2308.05600)",
)

__all__ = ["METHOD", "NUPESConfig"]
