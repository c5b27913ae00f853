"""QLLM: channels with outliers are split and similar ones merged, then low-rank corrections are trained and fused."""

from hf_lowbit.method import Method
from hf_lowbit_qllm.config import QLLMConfig

METHOD = Method(
    name="qllm",
    config_class=QLLMConfig,
    recipe="hf_lowbit_qllm.recipe:make_recipe",
    summary="4- and 6-bit weights and inputs: outlier channels are split, a low-rank correction is trained and fused",
    paper="QLLM: Accurate and Efficient Low-Bitwidth Quantization for Large Language Models (arXiv 2310.08041)",
    needs_data=True,
)

__all__ = ["METHOD", "QLLMConfig"]
