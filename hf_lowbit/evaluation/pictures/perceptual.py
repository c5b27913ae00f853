"""A distance of two pictures in a classifier's maps: LPIPS' formula (Zhang et al. 2018) without its trained weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def map_distance(maps: Sequence[Tensor], reference: Sequence[Tensor]) -> Tensor:
    """Sum over stages of the mean over space of |f - g|^2, with f and g of unit length along channels; float64 [n].

    LPIPS weighs channels by weights trained on people's judgements, of which there are none for these maps: here
    every channel counts the same, and numbers are not those of LPIPS.

    Args:
        maps, reference: a map [n, c, h, w] of each stage.

    Raises:
        ValueError: maps of different shapes.
    """
    shapes, others = ([list(m.shape) for m in given] for given in (maps, reference))
    if shapes != others or not shapes:
        raise ValueError(f"maps {shapes} and {others} are not of the same pictures and classifier")
    stages = [(_unit(f) - _unit(g)).square().sum(1).mean((1, 2)) for f, g in zip(maps, reference, strict=True)]
    return torch.stack(stages).sum(0)


def _unit(values: Tensor) -> Tensor:
    values = values.double()
    return values / values.norm(dim=1, keepdim=True).clamp(min=1e-10)
