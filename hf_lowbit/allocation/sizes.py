"""What is stored for a group of layers, from the plan alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import nn

from hf_lowbit.nn import KINDS
from hf_lowbit.plan import PlannedLayer


class GroupSize(NamedTuple):
    """Sizes of a group of layers.

    Attributes:
        elements: weights.
        bits: stored at each candidate: codes, scales, zero points, tables and low-rank factors.
    """

    elements: int
    bits: list[int]


def stored_sizes(model: nn.Module, group: Sequence[str], candidates: Mapping[str, Sequence[PlannedLayer]]) -> GroupSize:
    """Sizes as :func:`hf_lowbit.report` counts them; a parameter that several layers share counts once.

    Args:
        group: names of layers, which have the same number of candidates.
        candidates: layer -> what it may become.
    """
    elements, stored = 0, [0] * len(candidates[group[0]])
    counted: set[int] = set()
    for name in group:
        module, found = model.get_submodule(name), set[int]()
        for index, layer in enumerate(candidates[name]):
            skeleton = KINDS[layer.kind].from_float(module, layer.spec)
            for key in skeleton.packed_parameters:
                parameter = id(getattr(skeleton, key))
                if parameter in counted:
                    continue
                shapes = skeleton.companion_shapes(key).values()
                stored[index] += sum(8 * dtype.itemsize * math.prod(shape) for shape, dtype in shapes)
                if parameter not in found:
                    leading, columns = skeleton.matrix_shape(key)
                    elements += math.prod(leading) * columns
                    found.add(parameter)
        counted |= found
    return GroupSize(elements, stored)
