"""OmniQuant: clipping ranges learned block by block."""

from hf_lowbit.method import Method
from hf_lowbit_omniquant.config import OmniQuantConfig

METHOD = Method(
    name="omniquant",
    config_class=OmniQuantConfig,
    recipe="hf_lowbit_omniquant.recipe:make_recipe",
    summary="learned clipping ranges, trained block by block: hours on a CPU; for 3 and 2 bits",
    paper="OmniQuant: Omnidirectionally Calibrated Quantization for Large Language Models (arXiv 2308.13137)",
    needs_data=True,
)

__all__ = ["METHOD", "OmniQuantConfig"]
