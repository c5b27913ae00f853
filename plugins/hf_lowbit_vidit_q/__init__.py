"""ViDiT-Q: inputs of diffusion transformers quantized token by token, channels balanced with the weights."""

from hf_lowbit.method import Method
from hf_lowbit_vidit_q.config import ViDiTQConfig

METHOD = Method(
    name="vidit_q",
    config_class=ViDiTQConfig,
    recipe="hf_lowbit_vidit_q.recipe:make_recipe",
    summary="8-bit inputs with a zero point per token; below 8-bit weights channels are balanced between the two",
    paper="ViDiT-Q: Quantization of Diffusion Transformers for Image and Video Generation (arXiv 2406.02540)",
    domains=("diffusion",),
    needs_data=True,
)

__all__ = ["METHOD", "ViDiTQConfig"]
