"""A free codebook per tensor: one-dimensional k-means on weights that are scaled to [-1, 1] group by group."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_lowbit.formats import WeightSpec

_SAMPLE_ELEMENTS = 1 << 18
_ITERATIONS = 200


def fit_codebook(weight: Tensor, spec: WeightSpec) -> Tensor:
    """float32 ``[2^bits]`` ascending values in [-1, 1] for ``[rows, columns]`` weights.

    Groups are divided by their absmax; with a zero point, the middle of their range is moved to zero first.

    Lloyd's algorithm started from evenly spaced quantiles, on every n-th row so that about 2^18 weights are read:
    deterministic. A start that no weight is nearest to stays where it is.
    """
    rows, columns = weight.shape
    sample = weight[:: -(-rows * columns // _SAMPLE_ELEMENTS)].float()
    grouped = (
        sample.reshape(1, -1) if spec.group_size == "tensor" else sample.reshape(-1, columns // spec.groups(columns))
    )
    if not spec.symmetric:
        grouped = grouped - (grouped.amax(-1, keepdim=True) + grouped.amin(-1, keepdim=True)) / 2
    values = (grouped / grouped.abs().amax(-1, keepdim=True).clamp(min=1e-30)).flatten().sort().values
    size = 2**spec.bits
    quantiles = torch.linspace(0, len(values) - 1, size + 2, device=values.device)[1:-1].long()
    table = values[quantiles]
    sums = torch.nn.functional.pad(values.double().cumsum(0), (1, 0))
    first, last = quantiles.new_tensor([0]), quantiles.new_tensor([len(values)])
    for _ in range(_ITERATIONS):  # values are sorted: what is nearest to an entry is a slice of them
        edges = torch.cat([first, torch.searchsorted(values, (table[1:] + table[:-1]) / 2), last])
        count, total = edges.diff(), sums[edges].diff()
        table = torch.where(count > 0, (total / count.clamp(min=1)).float(), table)
    return table.cpu()
