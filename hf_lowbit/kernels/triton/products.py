"""The Triton products, on tensors: fused for few tokens; for many, decoded before the tensor cores, or beside them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_lowbit.formats import ActivationSpec
from hf_lowbit.formats.packed import from_bits
from hf_lowbit.formats.spec import SCALE_DTYPES
from hf_lowbit.kernels.triton import blocks, dense_blocks
from hf_lowbit.kernels.triton.blocks import DIGIT_TOKENS, FUSED_TOKENS, SLICE_BYTES, has_digits, is_wide
from hf_lowbit.kernels.triton.compiled import ALIGNMENT
from hf_lowbit.kernels.triton.device import interpreted, on_device_of
from hf_lowbit.kernels.triton.matrix import FLOAT_TYPES, HALF_TYPES, Matrix
from hf_lowbit.kernels.triton.unpack import CHUNK_BITS

_GRADIENT_ELEMENTS = 1 << 22
_MOST_COLUMNS = 1 << 15  # of a token that one block reads
_HOPPER = 9  # major compute capability
_UNIT_MULTIPLE = 16  # of every side of a product in int8 or float8
_FLOAT8 = {"float8_e4m3fn": torch.float8_e4m3fn, "fp_e4m3fn": torch.float8_e4m3fn}


def is_fused(matrix: Matrix) -> bool:
    """Whether few tokens are multiplied while codes are read; else rows are decoded to memory first."""
    return matrix.layout.tiling is not None


def linear(x: Tensor, matrix: Matrix) -> Tensor:
    """x ``[m, columns]`` times a packed matrix, summed in float32: ``[m, rows]`` in x's type.

    float32 inputs, many tokens, and layouts that do not fit the fused kernels take tiles of decoded rows.
    """
    if not x.shape[0]:
        return x.new_empty(0, matrix.rows)
    if suits_dense(x, matrix):
        from hf_lowbit.kernels.triton.dense_launch import launch_dense

        if (y := launch_dense(x, matrix)) is not None:
            return y
    if suits_wide(x, matrix):
        from hf_lowbit.kernels.triton.launch import launch_wide

        return launch_wide(x, matrix)
    if takes_digits(x, (matrix,), recorded := is_recorded(x)):
        from hf_lowbit.kernels.triton.launch import launch_digits

        return launch_digits(x, matrix, recorded)
    if suits_fused(x, matrix):
        from hf_lowbit.kernels.triton.launch import launch_fused

        return launch_fused(x, (matrix,), None, x.dtype)[0]
    if matrix.rows <= blocks.TILE_ROWS:
        return F.linear(x, decode_rows(matrix, slice(None), x.dtype))
    if x.is_cuda and x.shape[0] >= blocks.OVERLAPPED_TOKENS:
        return _overlapped(x, matrix)
    result = x.new_empty(x.shape[0], matrix.rows)
    for rows, tile in _tiles(matrix, x.dtype, blocks.TILE_ROWS):
        torch.mm(x, tile.t(), out=result[:, rows])
    return result


def _overlapped(x: Tensor, matrix: Matrix) -> Tensor:
    """Products of decoded tiles of rows. On another stream the next tile is decoded into a second buffer meanwhile.

    Multiprocessors that the end of a product leaves idle decode then.
    """
    result, step = x.new_empty(x.shape[0], matrix.rows), blocks.TILE_ROWS
    buffers = x.new_empty(2, step, matrix.columns)
    with on_device_of(x):
        here, other = torch.cuda.current_stream(), _decoding_stream(x.device, is_recorded(x))
        other.wait_stream(here)
        multiplied: list[torch.cuda.Event] = []
        for place, start in enumerate(range(0, matrix.rows, step)):
            rows = slice(start, min(start + step, matrix.rows))
            with torch.cuda.stream(other):
                if place >= len(buffers):
                    other.wait_event(multiplied[-len(buffers)])
                buffer = buffers[place % len(buffers), : rows.stop - start]
                tile = decode_rows(matrix, rows, x.dtype, buffer)
                decoded = other.record_event()
            here.wait_event(decoded)
            torch.mm(x, tile.t(), out=result[:, rows])
            multiplied.append(here.record_event())
    return result


@cache
def _decoding_stream(device: torch.device, recorded: bool) -> torch.cuda.Stream:
    """What is recorded into a CUDA graph has one of its own: another thread may go on with the other."""
    return torch.cuda.Stream(device)


def is_recorded(x: Tensor) -> bool:
    """Whether what is launched goes into a CUDA graph."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def takes_digits(x: Tensor, matrices: Sequence[Matrix], recorded: bool) -> bool:
    """Whether x and one matrix, or several that the fused kernel takes in one launch, are for the kernel for integers.

    It takes the GPU a little less time than the fused kernel, and is one launch more. While a CUDA graph is recorded
    that costs next to nothing. Layer after layer from Python it costs more than is saved, but for matrices so large
    that Python waits for the GPU. So results outside of a graph and from it can differ in their last bits.
    """
    size = sum(matrix.packed.weight.nbytes for matrix in matrices)
    least = blocks.EAGER_DIGITS_BYTES if not recorded else blocks.JOINT_DIGITS_BYTES if len(matrices) > 1 else 0
    others = size < least and all(is_fused(matrix) for matrix in matrices)
    return not others and all(suits_digits(x, matrix) for matrix in matrices)


def suits_fused(x: Tensor, matrix: Matrix) -> bool:
    """Whether x has few enough tokens for codes that are multiplied while they are read."""
    return is_fused(matrix) and x.shape[0] <= _most_fused(matrix)


def suits_digits(x: Tensor, matrix: Matrix) -> bool:
    """Whether x has so few tokens, and the matrix integers, groups and a size, that integers are multiplied."""
    if x.shape[0] > DIGIT_TOKENS or x.dtype not in HALF_TYPES:
        return False
    packed = matrix.packed
    spec, groups = packed.spec, packed.scale.shape[1]
    is_plain = spec.format == "int" and spec.symmetric and spec.packing == "dense" and packed.table is None
    if not is_plain or packed.scale.shape[0] != matrix.rows or matrix.columns > _MOST_COLUMNS:
        return False
    slices, rest = divmod(matrix.columns * spec.bits, 8 * SLICE_BYTES)
    if rest or slices % groups or not has_digits(x.shape[0], spec.bits, matrix.rows, slices, slices // groups):
        return False
    return interpreted() or _is_hopper(x)


def suits_dense(x: Tensor, matrix: Matrix) -> bool:
    """Whether x has the number of tokens, and the matrix the format and the size, for the kernel for many tokens.

    Its results are those of decoded rows, up to the order of sums. Only on Hopper, whose tensor cores read both sides
    from shared memory while threads compute on, and where Triton comes with Gluon.
    """
    if not dense_blocks.is_fastest(x.shape[0], matrix.rows, matrix.columns) or not dense_blocks.suits(matrix):
        return False
    packed = matrix.packed
    is_its_type = x.dtype in HALF_TYPES and x.dtype == SCALE_DTYPES[packed.spec.scale_dtype]
    if not is_its_type or interpreted() or packed.weight.data_ptr() % ALIGNMENT:
        return False
    return _capability(x.device)[0] == _HOPPER and has_gluon()


@cache
def has_gluon() -> bool:
    """Whether Triton has what that kernel is written in."""
    try:
        import hf_lowbit.kernels.triton.dense_launch  # noqa: F401
    except (ImportError, AttributeError):
        return False
    return True


def suits_wide(x: Tensor, matrix: Matrix) -> bool:
    """Whether x has the number of tokens, and the matrix the layout and the size, for the kernel between the others."""
    layout, packed = matrix.layout, matrix.packed
    tiling, spec = layout.tiling, packed.spec
    if tiling is None or tiling.parts > 1:
        return False
    slices = matrix.columns * spec.bits // (CHUNK_BITS * tiling.units)
    if not is_wide(x.shape[0], spec.bits, matrix.rows, tiling.units, slices):
        return False
    scales = spec.symmetric and SCALE_DTYPES[spec.scale_dtype] == x.dtype and packed.scale.shape[0] == matrix.rows
    whole = spec.bits in (2, 4, 8) and matrix.columns * spec.bits % (CHUNK_BITS * tiling.units) == 0
    return scales and whole and (interpreted() or (layout.scaled is not None and _is_hopper(x)))


def quantizes(x: Tensor, activation: ActivationSpec) -> bool:
    """Whether :func:`quantize_tokens` takes these: symmetric integers with a scale of each token's own."""
    simple = activation.brings_scales and activation.group_size is None
    return simple and x.dtype in FLOAT_TYPES and 0 < x.shape[1] <= _MOST_COLUMNS


def quantize_tokens(x: Tensor, activation: ActivationSpec) -> tuple[Tensor, Tensor]:
    """int8 codes of x ``[m, columns]`` and float32 scales ``[m, 1]``: those of the reference, in one pass."""
    if not x.shape[0]:
        return torch.empty(x.shape, dtype=torch.int8, device=x.device), torch.empty(0, 1, device=x.device)
    from hf_lowbit.kernels.triton.launch import launch_quantize

    return launch_quantize(x, activation.limit)


def multiplies_codes(matrix: Matrix, activation: ActivationSpec) -> bool:
    """Whether :func:`linear_of_codes` takes these inputs: one scale per token, and both sides exact in bfloat16."""
    exact = activation.format in ("int", "float8_e4m3fn") or activation.floating_point is not None
    return activation.group_size is None and exact and matrix.layout.exact_tiling is not None and matrix.layout.is_exact


def linear_of_codes(codes: Tensor, scale: Tensor, matrix: Matrix, dtype: torch.dtype) -> Tensor | None:
    """Codes ``[m, columns]`` with float32 scales ``[m, 1]`` times a packed matrix described for bfloat16.

    Returns:
        ``[m, rows]`` in ``dtype``. Many tokens take the int8 units, codes decoded to int8 first, or those for float8,
        where rows have one scale; else None.
    """
    if not codes.shape[0]:
        return torch.empty(0, matrix.rows, dtype=dtype, device=codes.device)
    from hf_lowbit.kernels.triton.launch import launch_fused

    if codes.shape[0] <= _most_fused(matrix):
        return launch_fused(codes.to(torch.bfloat16), (matrix,), scale.contiguous(), dtype)[0]
    spec = matrix.packed.spec
    if spec.groups(matrix.columns) > 1 or not spec.symmetric or (matrix.columns | matrix.rows) % _UNIT_MULTIPLE:
        return None
    if codes.dtype == torch.int8 and spec.number_format.integer_multiplier is not None:
        return _int8_product(codes, scale, matrix, dtype)
    if codes.dtype == torch.float8_e4m3fn == _FLOAT8.get(spec.format) and dtype == torch.bfloat16 and _is_hopper(codes):
        weight = matrix.packed.weight.view(torch.float8_e4m3fn)
        row_scale = from_bits(matrix.packed.scale, spec.scale_dtype).expand(matrix.rows, 1)
        return torch._scaled_mm(codes, weight.t(), scale, row_scale.t().contiguous(), out_dtype=dtype)
    return None


def _int8_product(codes: Tensor, scale: Tensor, matrix: Matrix, dtype: torch.dtype) -> Tensor:
    """Integer sums of codes and of integers that the weight's table is a fraction of, scaled on both sides."""
    from hf_lowbit.kernels.triton.launch import launch_decode, launch_rescale

    multiplier = matrix.packed.spec.number_format.integer_multiplier or 1
    integers = torch.empty(matrix.rows, matrix.columns, dtype=torch.int8, device=codes.device)
    launch_decode(matrix, 0, None, integers, table=matrix.table(torch.float32) * multiplier, scaled=False)
    sums = torch._int_mm(codes, integers.t())
    row_scale = from_bits(matrix.packed.scale, matrix.packed.spec.scale_dtype).expand(matrix.rows, 1) / multiplier
    return launch_rescale(sums, scale, row_scale, dtype)


def linear_gradient(gradient: Tensor, matrix: Matrix) -> Tensor:
    """Gradient ``[m, rows]`` times the weight: ``[m, columns]`` in the gradient's type, summed in float32."""
    if matrix.rows * matrix.columns <= _GRADIENT_ELEMENTS:
        return gradient @ decode_rows(matrix, slice(None), gradient.dtype)
    result = torch.zeros(gradient.shape[0], matrix.columns, device=gradient.device)
    for rows, tile in _tiles(matrix, gradient.dtype, max(16, _GRADIENT_ELEMENTS // matrix.columns)):
        result += gradient[:, rows] @ tile
    return result.to(gradient.dtype)


def decode_rows(matrix: Matrix, rows: slice | Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """Decoded rows ``[n, columns]``, equal to the torch reference to the last bit; into ``out`` if it is given.

    Rows of an index are not checked: that would wait for the GPU.
    """
    from hf_lowbit.kernels.triton.launch import launch_decode

    index, start = None, 0
    if isinstance(rows, slice):
        start, stop, _ = rows.indices(matrix.rows)
        n = max(0, stop - start)
    else:
        index = rows.to(torch.int64).contiguous()
        n = index.numel()
    if out is None:
        out = torch.empty(n, matrix.columns, dtype=dtype, device=matrix.packed.weight.device)
    if n:
        launch_decode(matrix, start, index, out)
    return out


def _most_fused(matrix: Matrix) -> int:
    return FUSED_TOKENS[matrix.packed.spec.bits]


def _is_hopper(tensor: Tensor) -> bool:
    """Or newer: it multiplies float8, and takes one side of a product from registers."""
    return tensor.is_cuda and _capability(tensor.device) >= (_HOPPER, 0)


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    """Asked for every product: torch takes microseconds to tell."""
    return torch.cuda.get_device_capability(device)


def _tiles(matrix: Matrix, dtype: torch.dtype, step: int) -> Iterator[tuple[slice, Tensor]]:
    """Row ranges and their decoded rows, in one buffer that the next tile overwrites."""
    buffer = torch.empty(min(step, matrix.rows), matrix.columns, dtype=dtype, device=matrix.packed.weight.device)
    for start in range(0, matrix.rows, step):
        rows = slice(start, min(start + step, matrix.rows))
        yield rows, decode_rows(matrix, rows, dtype, buffer[: rows.stop - start])
