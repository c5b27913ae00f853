"""Which number format a matrix takes at its bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from hf_lowbit.calibration.matrices import Matrix
from hf_lowbit.formats import WeightSpec, decode
from hf_lowbit.rounding.clip import fit_clipped
from hf_lowbit.rounding.store import round_with

_ROWS = 256  # that are tried


def chooser(formats: list[str]) -> Callable[[Matrix, Tensor], WeightSpec]:
    """A matrix and the mean of x x^T over its inputs -> the specification of least error among the formats.

    The error is that of nearest rounding on searched grids, weighted with the inputs' power, of evenly spread rows.
    Left as planned are experts, which share a specification, zero points, other formats and quantized inputs, whose
    integer products need integers.
    """

    def choose(matrix: Matrix, hessian: Tensor) -> WeightSpec:
        spec = matrix.spec
        is_plain = spec.format == "int" and spec.symmetric and spec.scale_bits is None and 2 <= spec.bits <= 4
        if matrix.expert is not None or not is_plain or matrix.layer_spec.activation is not None:
            return spec
        rows = matrix.weight[:: max(1, len(matrix.weight) // _ROWS)]
        options = [replace(spec, format=name) for name in formats]
        return (
            min(options, key=lambda option: _error(rows, option, hessian.diagonal()))
            if len(options) > 1
            else options[0]
        )

    return choose


def _error(rows: Tensor, spec: WeightSpec, power: Tensor) -> float:
    difference = rows - decode(round_with(fit_clipped, rows, spec, power))
    return float((difference.square() * power).sum())
