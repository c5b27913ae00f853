"""A free codebook per tensor: one-dimensional k-means on weights divided by their group's absmax."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_lowbit.formats import WeightSpec

_SAMPLE_ELEMENTS = 1 << 18
_ITERATIONS = 30


def fit_codebook(weight: Tensor, spec: WeightSpec) -> Tensor:
    """float32 ``[2^bits]`` ascending values in [-1, 1] for ``[rows, columns]`` weights.

    Lloyd's algorithm started from evenly spaced quantiles, on every n-th row so that about 2^18 weights are read:
    deterministic. A start that no weight is nearest to stays where it is.
    """
    rows, columns = weight.shape
    sample = weight[:: -(-rows * columns // _SAMPLE_ELEMENTS)].float()
    grouped = sample.reshape(1, -1) if spec.group_size == "tensor" else sample.reshape(-1, columns // spec.groups(columns))
    values = (grouped / grouped.abs().amax(-1, keepdim=True).clamp(min=1e-30)).flatten().sort().values
    size = 2**spec.bits
    quantiles = torch.linspace(0, len(values) - 1, size + 2, device=values.device)[1:-1].long()
    table = values[quantiles]
    for _ in range(_ITERATIONS):
        nearest = torch.bucketize(values, (table[1:] + table[:-1]) / 2)
        total = torch.zeros(size, device=values.device).scatter_add_(0, nearest, values)
        count = torch.bincount(nearest, minlength=size)
        table = torch.where(count > 0, total / count.clamp(min=1), table).sort().values
    separate = torch.arange(size, device=table.device) * 1e-6  # equal starts stay distinct table entries
    return (table + separate).cpu()
