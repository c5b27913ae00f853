"""Mixed precision of a pipeline's denoiser: bits of weights and inputs, by its pictures (MixDQ, arXiv 2405.17873)."""

from hf_lowbit.search.pipeline.result import Candidate, LayerChoice, PipelineSearchResult
from hf_lowbit.search.pipeline.run import search_pipeline
from hf_lowbit.search.pipeline.settings import OBJECTIVES

__all__ = ["OBJECTIVES", "Candidate", "LayerChoice", "PipelineSearchResult", "search_pipeline"]
