"""Where the table of a number format is laid over a group of weights: its scale and zero point, from the range.

Conventions (the ones the literature's RTN baselines differ in; [ours] where no paper fixes it):
 - symmetric integers use the full range, scale = absmax / (2^(b-1) - 1/2), as GPTQ's and compressed-tensors' symmetric
   grids do, so that |w - w_hat| <= scale / 2 for every weight (within the rounding of the stored scale: one that was
   rounded down moves the largest weights just beyond the grid, where they saturate);
 - asymmetric integers force the range to contain zero (GPTQ's convention), with an integer zero point;
 - one bit is sign(w) * mean|w|, the L1-optimal binarisation (XNOR-Net, arXiv 1603.05279), around the mean when
   there is a zero point [ours];
 - the scale of ternary is the mean magnitude of the weights above 0.7 mean|w| (Ternary Weight Networks, arXiv
   1605.04711); codes are the nearest ones, so that weights above scale / 2 are kept [ours: never a larger error];
 - every other table is scaled so that its largest value meets the group's absmax; with a zero point, the table's
   middle meets the middle of the range [ours].
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hf_lowbit.formats import NumberFormat, WeightSpec
from hf_lowbit.formats.packed import from_bits, to_bits
from hf_lowbit.formats.second_level import decode_values, encode_values
from hf_lowbit.formats.spec import SCALE_DTYPES

_TERNARY_THRESHOLD = 0.7


class RoundingError(ValueError):
    """A weight that cannot be quantized as asked: not finite, or beyond its scale's range."""


class Grid(NamedTuple):
    """float32 scale and zero point ``[n, groups]``, both as they will be read back from storage."""

    scale: Tensor
    zero_point: Tensor

    def to_table_units(self, grouped: Tensor) -> Tensor:
        """``[n, groups, g]`` weights divided by their scale and shifted by their zero point."""
        return grouped / nonzero(self.scale).unsqueeze(-1) + self.zero_point.unsqueeze(-1)


def fit_grid(grouped: Tensor, spec: WeightSpec, number_format: NumberFormat) -> Grid:
    """Scale and zero point of float32 ``[n, groups, g]`` weights.

    Raises:
        RoundingError: NaN or infinite weights, or a scale that ``spec.scale_dtype`` cannot hold.
    """
    if not bool(torch.isfinite(grouped).all()):
        raise RoundingError("the weight holds NaN or infinite values")
    if not is_laid_on_the_range(number_format):
        return _mean_grid(grouped, spec, number_format)
    if spec.symmetric:
        high = grouped.abs().amax(-1)
        return grid_of_range(-high, high, spec, number_format)
    return grid_of_range(grouped.amin(-1), grouped.amax(-1), spec, number_format)


def grid_of_range(low: Tensor, high: Tensor, spec: WeightSpec, number_format: NumberFormat) -> Grid:
    """The grid over ``[low, high]``, float32 ``[n, groups]`` each, for formats that :func:`is_laid_on_the_range`.

    Symmetric ones read ``high`` alone, the largest magnitude; integer zero points widen the range to contain zero.

    Raises:
        RoundingError: a scale that ``spec.scale_dtype`` cannot hold.
    """
    if spec.symmetric:
        scale = _as_stored(high / _symmetric_reach(spec, number_format), spec)
        return Grid(scale, torch.zeros_like(scale))
    if spec.has_integer_zero_point:
        return _integer_grid(low.clamp(max=0), high.clamp(min=0), spec, number_format)
    return _centred_grid(low, high, spec, number_format)


def shifted_grid(scale: Tensor, shift: Tensor, spec: WeightSpec) -> Grid:
    """The grid, with real zero points, whose table is multiplied by ``scale`` and moved by ``shift`` ``[n, groups]``.

    Raises:
        RoundingError: a scale or zero point that ``spec.scale_dtype`` cannot hold.
    """
    scale = _as_stored(scale, spec)
    return Grid(scale, _stored_zero_point(-shift / nonzero(scale), spec))


def is_laid_on_the_range(number_format: NumberFormat) -> bool:
    """True where the extremes of a group decide its grid; ternary and one bit go by mean magnitudes."""
    return number_format.name != "ternary" and not (number_format.name == "int" and number_format.bits == 1)


def rescaled(grid: Grid, factor: float, spec: WeightSpec) -> Grid:
    """The grid, of a real zero point or none, with all its values moved from their middle by ``factor``.

    Raises:
        RoundingError: a scale that ``spec.scale_dtype`` cannot hold.
    """
    scale = _as_stored(grid.scale * factor, spec)
    return Grid(scale, _stored_zero_point(grid.zero_point * grid.scale / nonzero(scale), spec))


def as_decoded(grid: Grid, spec: WeightSpec) -> Grid:
    """The grid as it will be read back where the spec stores scales as codes; before any code of a weight is chosen.

    Of whole groups of ``spec.scale_group`` rows: those of a matrix, or a part of it that starts and ends with them.
    Plain scales are what they will be already.

    Raises:
        RoundingError: scales or zero points beyond the range of ``spec.scale_dtype``.
    """
    if spec.scale_bits is None:
        return grid
    zero_point = _as_decoded(grid.zero_point, spec, "zero point") if spec.has_coded_zero_point else grid.zero_point
    return Grid(_as_decoded(grid.scale, spec, "scale"), zero_point)


def nonzero(scale: Tensor) -> Tensor:
    """The scale to divide by: 1 where a group is all zero."""
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def _symmetric_reach(spec: WeightSpec, number_format: NumberFormat) -> float:
    """The largest magnitude of a group, in table units."""
    if number_format.is_integer_grid:
        return 2 ** (number_format.bits - 1) - 0.5
    return 1.0 if spec.has_fitted_table else number_format.max_value


def _mean_grid(grouped: Tensor, spec: WeightSpec, number_format: NumberFormat) -> Grid:
    """Ternary and one bit."""
    magnitude = grouped.abs()
    if number_format.name == "ternary":
        kept = magnitude > _TERNARY_THRESHOLD * magnitude.mean(-1, keepdim=True)
        scale = _as_stored((magnitude * kept).sum(-1) / kept.sum(-1).clamp(min=1), spec)
        return Grid(scale, torch.zeros_like(scale))
    if spec.symmetric:
        scale = _as_stored(magnitude.mean(-1), spec)
        return Grid(scale, torch.zeros_like(scale))
    mean = grouped.mean(-1)
    scale = _as_stored((grouped - mean.unsqueeze(-1)).abs().mean(-1), spec)
    constant = scale == 0  # its only value is scale * sign
    scale = torch.where(constant, _as_stored(mean.abs(), spec), scale)
    return Grid(scale, _stored_zero_point(torch.where(constant, 0.0, -mean / nonzero(scale)), spec))


def _integer_grid(low: Tensor, high: Tensor, spec: WeightSpec, number_format: NumberFormat) -> Grid:
    first, last = number_format.table[0].item(), number_format.table[-1].item()
    scale = _as_stored((high - low) / (last - first), spec)
    return Grid(scale, (first - low / nonzero(scale)).round().clamp_(first, last))


def _centred_grid(low: Tensor, high: Tensor, spec: WeightSpec, number_format: NumberFormat) -> Grid:
    finite = number_format.table[torch.isfinite(number_format.table)]
    top, bottom = (1.0, -1.0) if spec.has_fitted_table else (finite.max().item(), finite.min().item())
    scale = _as_stored((high - low) / (top - bottom), spec)
    scale = torch.where((scale == 0) & (low != 0), _as_stored(low.abs(), spec), scale)  # a constant group
    middle = (high + low) / 2 / nonzero(scale)
    return Grid(scale, _stored_zero_point((top + bottom) / 2 - middle, spec))


def _stored_zero_point(values: Tensor, spec: WeightSpec) -> Tensor:
    """Like :func:`_as_stored`, but a zero point may vanish: beside a table's steps it is zero then."""
    tiny = torch.finfo(SCALE_DTYPES[spec.scale_dtype]).tiny
    return _as_stored(torch.where(values.abs() < tiny, torch.zeros_like(values), values), spec, "zero point")


def _as_decoded(values: Tensor, spec: WeightSpec, what: str) -> Tensor:
    words, ranges = encode_values(values, spec, SCALE_DTYPES[spec.scale_dtype])
    decoded = decode_values(words, ranges, spec, values.shape[1])
    if not bool(torch.isfinite(decoded).all()):
        raise RoundingError(
            f"{what}s of up to {values.abs().max().item():.3g} do not fit scale_dtype={spec.scale_dtype!r}; "
            "use scale_dtype='bfloat16', or scale_bits=None"
        )
    return decoded


def _as_stored(values: Tensor, spec: WeightSpec, what: str = "scale") -> Tensor:
    """Values after their round trip through storage. Raises RoundingError where that loses them altogether."""
    rounded = from_bits(to_bits(values, spec.scale_dtype), spec.scale_dtype)
    lost = ~torch.isfinite(rounded) | ((rounded == 0) & (values != 0))
    if bool(lost.any()):
        raise RoundingError(
            f"a {what} of {values[lost][0].item():.3g} does not fit scale_dtype={spec.scale_dtype!r}; "
            "use scale_dtype='bfloat16' or 'float32'"
        )
    return rounded
