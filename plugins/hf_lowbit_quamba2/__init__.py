"""Quamba2: state-space models of both generations in 8 or 4 bits, heads and channels sorted so that few scales do."""

from hf_lowbit.method import Method
from hf_lowbit_quamba2.config import Quamba2Config

METHOD = Method(
    name="quamba2",
    config_class=Quamba2Config,
    recipe="hf_lowbit_quamba2.recipe:make_recipe",
    summary="Mamba and Mamba-2 as W8A8, W4A8 or W4A16: channels sorted and clustered, scales per state group, GPTQ",
    paper="Quamba2: A Robust and Scalable Post-training Quantization Framework for Selective State Space Models "
    "(arXiv 2503.22879)",
    domains=("language", "state-space"),
    needs_data=True,
)

__all__ = ["METHOD", "Quamba2Config"]
