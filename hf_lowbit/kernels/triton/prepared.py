"""Products of few tokens whose launches are bound: for inputs that follow, nothing is looked for again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from hf_lowbit.kernels.triton.matrix import Matrix
from hf_lowbit.kernels.triton.products import suits_dense, suits_fused, suits_wide, takes_digits

Launch: TypeAlias = Callable[..., None]
"""f(x, *out): contiguous inputs ``[..., columns]``, aligned to 16 bytes, and one ``[..., rows]`` for each matrix."""


def prepare(x: Tensor, matrices: Sequence[Matrix]) -> Launch | None:
    """What launches the products of x ``[m, columns]`` for others of the same shape and type.

    Matrices that are alike but for their rows share a launch, or the digits of the inputs. Outside of a CUDA graph all
    bits are those of :func:`hf_lowbit.kernels.triton.linear`, unless matrices are large together and not alone. The
    addresses of the weights are kept, not the weights. x is multiplied on the way.

    Returns:
        None where rows are decoded first, for middling numbers of tokens, and in the interpreter.
    """
    others = (suits_dense, suits_wide)
    if not x.shape[0] or any(suits(x, matrix) for suits in others for matrix in matrices):
        return None
    if not all(suits_fused(x, matrix) for matrix in matrices):
        return None
    from hf_lowbit.kernels.triton.launch import alike

    groups: dict[Any, list[int]] = {}  # places of matrices by what they share
    for place, matrix in enumerate(matrices):
        groups.setdefault(alike(x, matrix), []).append(place)
    prepared = [(_prepare(x, [matrices[place] for place in places]), places) for places in groups.values()]
    launches = [(launch, places) for launch, places in prepared if launch is not None]
    if len(launches) < len(prepared):
        return None
    if len(launches) == 1:
        return launches[0][0]

    def launch_all(x: Tensor, *out: Tensor) -> None:
        for launch, places in launches:
            launch(x, *[out[place] for place in places])

    return launch_all


def _prepare(x: Tensor, matrices: Sequence[Matrix]) -> Launch | None:
    """Of matrices that are alike; launches in a CUDA graph can be others."""
    from hf_lowbit.kernels.triton.launch import bind_digits, bind_fused

    eagerly, recorded = (
        bind_digits(x, matrices, graph) if takes_digits(x, matrices, graph) else bind_fused(x, matrices)
        for graph in (False, True)
    )
    if eagerly is None or recorded is None or (eagerly.first, eagerly.steps) == (recorded.first, recorded.steps):
        return eagerly

    def launch(x: Tensor, *out: Tensor) -> None:
        if torch._C._cuda_isCurrentStreamCapturing():
            recorded(x, *out)
        else:
            eagerly(x, *out)

    return launch
