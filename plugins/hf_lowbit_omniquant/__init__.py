"""OmniQuant: clipping ranges, and for quantized inputs equivalent transformations, learned block by block."""

from hf_lowbit.method import Method
from hf_lowbit_omniquant.config import OmniQuantConfig

METHOD = Method(
    name="omniquant",
    config_class=OmniQuantConfig,
    recipe="hf_lowbit_omniquant.recipe:make_recipe",
    summary="clipping ranges, and scales for quantized inputs, learned block by block: hours on a CPU; for few bits",
    paper="OmniQuant: Omnidirectionally Calibrated Quantization for Large Language Models (arXiv 2308.13137)",
    needs_data=True,
)

__all__ = ["METHOD", "OmniQuantConfig"]
