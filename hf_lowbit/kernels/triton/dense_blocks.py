"""The table of the kernel for many tokens: its shapes, what they cost, and how tiles are divided among blocks.

Measured on an H100 (benchmarks/speed_gpu.py); what is estimated is within a tenth of what was measured there.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

from hf_lowbit.kernels.triton.matrix import Matrix

STEP = 64  # columns of a stage
_MOST_PARTS, _MOST_ROUNDS = 8, 8  # of a tile; of whole tiles before parts, after which these save next to nothing
# Around a tile; of a second launch; of sums written and read: bytes per clock.
_TILE_CLOCKS, _SUMS_CLOCKS, _SUMS_BYTES = 3000, 6000, 1500
# Numbers of weights from which it beats decoding to memory, and few tokens' own kernels.
_FEWEST_TOKENS, _WEIGHTS = 65, 1 << 23
_FEW_TOKENS, _FEW_TOKENS_ROWS, _FEW_TOKENS_WEIGHTS = 33, 6144, 1 << 25
_BITS, _FIRST_VALUE = 4, -8.0
_ROW_MULTIPLE, _COLUMN_MULTIPLE = 8, 2 * STEP  # of 16 bytes of an output; codes are brought for two stages


class Shape(NamedTuple):
    """Rows and tokens of a tile, stages of the ring, pairs of them whose codes are on their way, and the warp groups.

    Attributes:
        flip: weights are the left side of products, and tokens their many columns.
        multiplying, producing: registers of a thread of those warp groups.
        clocks: of a stage, where the tensor cores take most of the GPU's power: their own with 256 tokens, else those
            of decoding.
    """

    rows: int
    tokens: int
    stages: int
    ahead: int
    producers: int
    consumers: int
    flip: bool
    multiplying: int
    producing: int
    clocks: int


SHAPES = (
    Shape(128, 256, 4, 2, 1, 2, True, 192, 120, 1060),
    Shape(128, 128, 6, 1, 2, 2, True, 136, 112, 780),
    Shape(128, 64, 6, 2, 2, 1, False, 168, 168, 560),
)


class Division(NamedTuple):
    """Of tiles among blocks: ``whole`` ones first, as many for each; then ``rest`` more, each in ``parts``."""

    whole: int
    rest: int
    parts: int


def suits(matrix: Matrix) -> bool:
    """Whether a matrix has the format and the sizes: integers of 4 bits without zero points, a scale in each row."""
    packed, layout = matrix.packed, matrix.layout
    spec, groups = packed.spec, packed.scale.shape[1]
    is_plain = spec.bits == _BITS and layout.offset == _FIRST_VALUE and layout.zero_kind == 0
    if not is_plain or spec.packing != "dense" or packed.table is not None or packed.scale.shape[0] != matrix.rows:
        return False
    group = matrix.columns // groups
    fits = groups == 1 or group == STEP or group % _COLUMN_MULTIPLE == 0
    whole = matrix.rows % _ROW_MULTIPLE == 0 and matrix.columns % _COLUMN_MULTIPLE == 0
    return fits and whole and matrix.columns > _COLUMN_MULTIPLE


def is_fastest(tokens: int, rows: int, columns: int) -> bool:
    """Whether there are tokens and weights enough."""
    if tokens >= _FEWEST_TOKENS:
        return rows * columns >= _WEIGHTS
    return tokens >= _FEW_TOKENS and (rows >= _FEW_TOKENS_ROWS or rows * columns > _FEW_TOKENS_WEIGHTS)


@lru_cache(maxsize=4096)
def choose(tokens: int, rows: int, columns: int, blocks: int) -> tuple[Shape, Division]:
    """The shape and the division that are estimated to take the least time of so many blocks."""
    every = ((shape, *one) for shape in SHAPES for one in divisions(tokens, rows, columns, blocks, shape))
    shape, division, _ = min(every, key=lambda found: found[2])
    return shape, division


def divisions(tokens: int, rows: int, columns: int, blocks: int, shape: Shape) -> Iterator[tuple[Division, float]]:
    """Whole tiles alone, and parts in the last round where there are blocks for them; and the clocks that they take."""
    tiles = -(-tokens // shape.tokens) * -(-rows // shape.rows)
    rounds, rest = divmod(tiles, blocks)
    steps = columns // STEP
    clocks = steps * shape.clocks + _TILE_CLOCKS
    yield Division(tiles, 0, 1), (rounds + (rest > 0)) * clocks
    parts = min(blocks // rest, _MOST_PARTS, steps // 4) if rest else 1
    if parts > 1 and rounds <= _MOST_ROUNDS:
        sums = _SUMS_CLOCKS + 2 * 4 * parts * rest * shape.rows * shape.tokens / _SUMS_BYTES
        last = -(-steps // parts) * shape.clocks + _TILE_CLOCKS
        yield Division(rounds * blocks, rest, parts), rounds * clocks + last + sums
