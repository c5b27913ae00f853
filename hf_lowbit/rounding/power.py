"""PowerQuant's exponent: the power table that fits a weight best, found without data.

PowerQuant (arXiv 2301.09858) and NUPES (arXiv 2308.05600) quantize in the domain of w^a, so that codes lie dense near
zero for a < 1: the format "power", whose table is sign(k) (|k| / qmax)^(1/a). Their authors published no code; this is
a re-implementation from the description. [ours] where that was silent:
 - the search: a grid, then golden section in its best bracket. The error is smooth with one minimum for bell-shaped
   weights, where the authors use Nelder-Mead from one start;
 - one exponent per layer (the abstracts' "of each layer"), for a stack of experts one for all;
 - codes are those whose decoded value is nearest to the weight. The papers round in the domain of w^a, which gives
   the same codes for a = 1, never smaller errors for others, and up to a fifth larger ones at 3 bits.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from hf_lowbit.formats import PackedTensor, WeightSpec
from hf_lowbit.rounding.grid import RoundingError, fit_grid
from hf_lowbit.rounding.nearest import round_to_nearest

EXPONENTS = tuple(step / 20 for step in range(4, 25))  # 0.20, 0.25, ... 1.20
_TOLERANCE = 1e-3
_DIGITS = 4  # of a stored exponent: ten times finer than the search
_GOLDEN = (5**0.5 - 1) / 2
_SAMPLE_ELEMENTS = 1 << 18


def round_power(weight: Tensor, spec: WeightSpec, norm: float = 2.0) -> PackedTensor:
    """Round to the nearest values of a power table, searching its exponent where the spec leaves it open.

    Args:
        weight: float ``[rows, columns]``, or ``[experts, rows, columns]``.
        spec: format "power".
        norm: of :func:`search_exponent`.

    Returns:
        A packed tensor whose spec names the exponent.

    Raises:
        RoundingError: another format, NaN or infinite weights, or scales that ``spec.scale_dtype`` cannot hold.
    """
    _check_format(spec)
    if spec.is_open:
        spec = replace(spec, exponent=search_exponent(weight, spec, norm))
    return round_to_nearest(weight, spec)


def search_exponent(weight: Tensor, spec: WeightSpec, norm: float = 2.0) -> float:
    """The exponent whose power table loses least of a weight.

    Reads every n-th row so that about 2^18 weights are seen; with one scale for the whole tensor, that of these rows.

    Args:
        weight: float ``[..., rows, columns]``.
        spec: format "power"; its own exponent plays no part.
        norm: p of the error sum |w - w_hat|^p that is minimised, with scales and zero points as they are stored.

    Returns:
        0.2 <= a <= 1.2, a multiple of 10^-4, at which the error is at most that of every value of ``EXPONENTS``, 1.0
        among them; 1.0 where none is better.

    Raises:
        RoundingError: another format, NaN or infinite weights, or scales that ``spec.scale_dtype`` cannot hold.
    """
    _check_format(spec)
    grouped = _sample(weight, spec)
    errors = {1.0: exponent_error(grouped, spec, 1.0, norm)}  # first: ties are its own

    def error_of(exponent: float) -> float:
        exponent = round(exponent, _DIGITS)
        if exponent not in errors:
            errors[exponent] = exponent_error(grouped, spec, exponent, norm)
        return errors[exponent]

    centre = EXPONENTS.index(min((1.0, *EXPONENTS), key=error_of))
    low, high = EXPONENTS[max(centre - 1, 0)], EXPONENTS[min(centre + 1, len(EXPONENTS) - 1)]
    while high - low > _TOLERANCE:
        left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
        if error_of(left) <= error_of(right):
            high = right
        else:
            low = left
    return min(errors, key=error_of)


def exponent_error(grouped: Tensor, spec: WeightSpec, exponent: float, norm: float = 2.0) -> float:
    """sum |w - w_hat|^norm of float32 ``[n, groups, g]`` weights in the power table of an exponent."""
    complete = replace(spec, exponent=exponent)
    number_format = complete.number_format
    grid = fit_grid(grouped, complete, number_format)
    values = number_format.decode(number_format.encode(grid.to_table_units(grouped)))
    error = (values - grid.zero_point.unsqueeze(-1)) * grid.scale.unsqueeze(-1) - grouped
    return error.abs().pow(norm).sum(dtype=torch.float64).item()


def _sample(weight: Tensor, spec: WeightSpec) -> Tensor:
    columns = weight.shape[-1]
    rows = weight.reshape(-1, columns)
    chosen = rows[:: max(1, rows.shape[0] * columns // _SAMPLE_ELEMENTS)].float()
    if spec.group_size == "tensor":
        return chosen.reshape(1, 1, -1)
    return chosen.reshape(chosen.shape[0], spec.groups(columns), -1)


def _check_format(spec: WeightSpec) -> None:
    if spec.format != "power":
        raise RoundingError(f"the exponent belongs to format 'power'; format {spec.format!r} has none")
