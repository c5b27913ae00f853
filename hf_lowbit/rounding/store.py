"""From weights and grids to packed tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_lowbit.formats import NumberFormat, PackedTensor, WeightSpec, pack_codes
from hf_lowbit.formats.packed import scales, to_stored
from hf_lowbit.rounding.clip import GridFit
from hf_lowbit.rounding.codebook import fit_codebook
from hf_lowbit.rounding.grid import Grid, RoundingError, as_decoded

_CHUNK_ELEMENTS = 1 << 20  # rows are rounded in chunks: float32 temporaries stay a few megabytes


def round_with(fit: GridFit, weight: Tensor, spec: WeightSpec, importance: Tensor | None = None) -> PackedTensor:
    """Nearest codes on grids that ``fit`` finds.

    Args:
        weight: float ``[rows, columns]``.
        importance: ``[columns]``, handed to ``fit`` as ``[groups, g]``.

    Raises:
        RoundingError: as ``fit`` does.
    """
    number_format, table = format_for(weight, spec)
    if importance is not None:
        importance = importance.float().reshape(spec.groups(weight.shape[1]), -1)
    if spec.group_size == "tensor":
        grid = fit(weight.float().reshape(1, 1, -1), spec, number_format, importance)
        return round_to_grid(weight, grid, spec, number_format, table)
    words, grids = [], []
    for rows in row_chunks(weight, spec.scale_group):
        grouped = to_groups(weight[rows], spec)
        grid = as_decoded(fit(grouped, spec.first_level, number_format, importance), spec)
        words.append(_words(grouped, grid, spec, number_format))
        grids.append(grid)
    return _packed(torch.cat(words), join(grids), spec, weight.shape[1], number_format, table)


def round_to_grid(
    weight: Tensor, grid: Grid, spec: WeightSpec, number_format: NumberFormat, table: Tensor | None = None
) -> PackedTensor:
    """Nearest codes of ``[rows, columns]`` weights on a given grid ``[rows or 1, groups]`` that storage holds exactly.

    Args:
        number_format: what the codes mean.
        table: float32 ``[2^bits]`` where the spec stores one of its own.
    """
    words = []
    for rows in row_chunks(weight):
        own = grid if grid.scale.shape[0] == 1 else Grid(grid.scale[rows], grid.zero_point[rows])
        words.append(_words(to_groups(weight[rows], spec), own, spec, number_format))
    return _packed(torch.cat(words), grid, spec, weight.shape[1], number_format, table)


def to_packed(
    codes: Tensor, grid: Grid, spec: WeightSpec, number_format: NumberFormat, table: Tensor | None = None
) -> PackedTensor:
    """uint8 codes ``[rows, columns]`` and their grid as they are stored; the arguments of :func:`round_to_grid`."""
    words = pack_codes(codes, spec.bits, spec.packing)
    return _packed(words, grid, spec, codes.shape[1], number_format, table)


def stack(matrices: list[PackedTensor]) -> PackedTensor:
    """Experts in one stack, with a scale per row even where one was computed for the whole matrix."""
    first = matrices[0]
    rows = first.weight.shape[0]

    def stacked(tensors: list[Tensor], scale_rows: int = rows) -> Tensor:
        return torch.stack([tensor.expand(scale_rows, *tensor.shape[1:]) for tensor in tensors])

    def optional(name: str, scale_rows: int = rows) -> Tensor | None:
        tensors = [getattr(matrix, name) for matrix in matrices]
        return None if tensors[0] is None else stacked(tensors, scale_rows)

    return PackedTensor(
        weight=stacked([matrix.weight for matrix in matrices]),
        scale=stacked([matrix.scale for matrix in matrices]),
        spec=first.spec,
        columns=first.columns,
        zero_point=optional("zero_point"),
        scale_range=optional("scale_range", first.spec.row_groups(rows)),
        zero_point_range=optional("zero_point_range", first.spec.row_groups(rows)),
    )


def format_for(weight: Tensor, spec: WeightSpec) -> tuple[NumberFormat, Tensor | None]:
    """The number format of a weight's codes, and the table that is stored with it if it was fitted to the weight."""
    if not spec.has_fitted_table:
        return spec.number_format, None
    table = fit_codebook(weight, spec)
    return NumberFormat("codebook", spec.bits, table), table


def to_groups(matrix: Tensor, spec: WeightSpec) -> Tensor:
    """float32 ``[rows, groups, g]`` view of ``[rows, columns]``."""
    rows, columns = matrix.shape
    return matrix.float().reshape(rows, spec.groups(columns), -1)


def row_chunks(matrix: Tensor, together: int = 1) -> list[slice]:
    """Slices of the rows of ``[rows, columns]``, each of about a million elements and a multiple of ``together``."""
    step = together * max(1, _CHUNK_ELEMENTS // matrix.shape[1] // together)
    return [slice(start, start + step) for start in range(0, matrix.shape[0], step)]


def join(grids: list[Grid]) -> Grid:
    """Grids of consecutive rows as one."""
    return Grid(*(torch.cat(parts) for parts in zip(*grids, strict=True)))


def _words(grouped: Tensor, grid: Grid, spec: WeightSpec, number_format: NumberFormat) -> Tensor:
    codes = number_format.encode(grid.to_table_units(grouped))
    return pack_codes(codes.reshape(codes.shape[0], -1), spec.bits, spec.packing)


def _packed(
    words: Tensor, grid: Grid, spec: WeightSpec, columns: int, number_format: NumberFormat, table: Tensor | None
) -> PackedTensor:
    zero_point, zero_point_range = None, None
    if spec.has_integer_zero_point:
        zero_point = pack_codes(number_format.encode(grid.zero_point), spec.bits)
    elif not spec.symmetric:
        zero_point, zero_point_range = to_stored(grid.zero_point, spec)
    scale, scale_range = to_stored(grid.scale, spec)
    packed = PackedTensor(
        weight=words,
        scale=scale,
        spec=spec,
        columns=columns,
        zero_point=zero_point,
        table=None if table is None else table.view(torch.int32).to(words.device),
        scale_range=scale_range,
        zero_point_range=zero_point_range,
    )
    if spec.scale_bits is not None and not torch.equal(scales(packed), grid.scale):
        raise RoundingError("its grid was not fitted for scales that are stored as codes: use scale_bits=None")
    return packed
