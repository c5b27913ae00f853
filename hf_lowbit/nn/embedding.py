"""Packed embedding table."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hf_lowbit.kernels import look_up_rows
from hf_lowbit.nn.base import PackedModule, expect
from hf_lowbit.nn.spec import LayerSpec


class PackedEmbedding(PackedModule, nn.Embedding):
    """nn.Embedding whose rows are decoded when they are looked up.

    The output type follows ``.to(dtype)`` as a float table's would: an empty buffer carries it.
    """

    kind = "embedding"
    output_dtype: Tensor

    def __init__(self, num_embeddings: int, embedding_dim: int, padding_idx: int | None, spec: LayerSpec) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False
        self.layer_spec = spec

    @classmethod
    def from_float(cls, module: nn.Module, spec: LayerSpec) -> PackedEmbedding:
        """From an nn.Embedding. Raises ValueError if it renormalises its rows (max_norm)."""
        embedding = expect(module, nn.Embedding)
        if embedding.max_norm is not None:
            raise ValueError("an embedding with max_norm rewrites its weights in forward and cannot be packed")
        packed = cls(embedding.num_embeddings, embedding.embedding_dim, embedding.padding_idx, spec)
        packed.weight = embedding.weight
        packed.register_buffer(
            "output_dtype", torch.empty(0, dtype=embedding.weight.dtype, device="cpu"), persistent=False
        )
        return packed

    def to_float(self, dtype: torch.dtype) -> nn.Module:
        """An nn.Embedding with dequantized rows."""
        module = nn.Embedding(self.num_embeddings, self.embedding_dim, self.padding_idx, device="meta")
        module.weight = nn.Parameter(self.dequantized(dtype=dtype))
        return module

    def matrix_shape(self, name: str) -> tuple[tuple[int, ...], int]:
        """((num_embeddings,), embedding_dim)."""
        return (self.num_embeddings,), self.embedding_dim

    def forward(self, indices: Tensor) -> Tensor:
        """Integer ``[...]`` to ``[..., embedding_dim]``. Raises IndexError for an index out of range."""
        flat = indices.reshape(-1)
        dtype = self.output_dtype.dtype
        factors = self.low_rank_factors("weight", torch.float32)
        rows = look_up_rows(self.packed(), flat, dtype if factors is None else torch.float32, self.backend)
        if factors is not None:
            rows = (rows + factors[1][flat] @ factors[0]).to(dtype)
        return rows.reshape(*indices.shape, self.embedding_dim)
