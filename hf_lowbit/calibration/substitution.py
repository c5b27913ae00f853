"""Rounded weights in the places of a model's own, for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from hf_lowbit.formats import PackedTensor, WeightSpec, decode
from hf_lowbit.nn import KINDS
from hf_lowbit.plan import PlannedLayer
from hf_lowbit.rounding import RoundingError

Rounding = Callable[[Tensor, WeightSpec], PackedTensor]


def rounded(matrix: Tensor, spec: WeightSpec, rounding: Rounding, where: str) -> Tensor:
    """What a matrix ``[..., rows, columns]`` is read back as, float32.

    Raises:
        RoundingError: naming ``where``.
    """
    try:
        return decode(rounding(matrix, spec))
    except RoundingError as problem:
        raise RoundingError(f"{where}: {problem}") from None


@contextmanager
def substituted(module: nn.Module, layers: Mapping[str, PlannedLayer], rounding: Rounding) -> Iterator[None]:
    """Within the context these layers have rounded weights, in the type of their own; afterwards the old tensors.

    Args:
        module: float.
        layers: name in the module -> what it becomes. Those that share a parameter must become the same.

    Raises:
        RoundingError: naming the parameter that cannot be rounded.
    """
    kept: dict[int, tuple[nn.Parameter, Tensor]] = {}
    try:
        for name, layer in layers.items():
            skeleton = KINDS[layer.kind].from_float(module.get_submodule(name), layer.spec)
            for key in skeleton.packed_parameters:
                parameter = getattr(skeleton, key)
                if id(parameter) in kept:
                    continue
                values = parameter.data
                matrix = rounded(skeleton.to_matrix(key, values), layer.spec.weight, rounding, f"{name}.{key}")
                kept[id(parameter)] = parameter, values
                parameter.data = skeleton.from_matrix(key, matrix).to(values.dtype)
        yield
    finally:
        for parameter, values in kept.values():
            parameter.data = values
