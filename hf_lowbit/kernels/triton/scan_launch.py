"""Launching the Triton scan and convolution: grids, block shapes and arguments."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_lowbit.kernels.operand import Convolution, Laid, Recurrence, laid_out, plain_floats
from hf_lowbit.kernels.triton.compiled import Grid, Plan, launch
from hf_lowbit.kernels.triton.convolution import convolve
from hf_lowbit.kernels.triton.scan import chain_states, scan_tokens
from hf_lowbit.kernels.triton.scan_chunks import chunk_outputs, chunk_states
from hf_lowbit.kernels.triton.state_space import SEGMENT

# As they measured best on an H200; benchmarks/scan.py --device cuda times them.
_STATES, _STATES_OF_ONE = 512, 256  # of a program (one warp) that scans token by token; of a single token
_TOKENS_AT_ONCE = 4  # read before their outputs are written
_PROGRAMS = 3072  # so many are enough: segments become longer instead
_CHUNK, _CHUNK_WARPS = 64, 4  # tokens of a product
_CHAINED = 512  # states of a program that chains segments
_LEAST_PRODUCT = 16  # the shortest side of a product in the tensor cores
_CONVOLVED = {"float": (16, 64), "int8": (32, 64), "token": (1, 128)}  # tokens and channels of a tile


class StateScale(NamedTuple):
    """Scales of the state's codes: float32 rows, the row of each channel or None for the first, and strides."""

    data: Tensor
    cluster: Tensor | None
    row_stride: int
    stride: int


_ABSENT: Any = Laid(None, None, 0, 0, 1)  # type: ignore[arg-type] # Triton cannot ask whether a tuple is None


class Scan(NamedTuple):
    """What the kernels of a scan have in common."""

    x: Laid
    dt: Laid
    A: Tensor
    B: Laid
    C: Laid
    D: Tensor | None
    z: Laid
    dt_bias: Tensor | None
    lower: float
    upper: float


def launch_scan(given: Recurrence, after: Tensor | None, y: Tensor, peaks_every: int | None) -> Tensor | None:
    """A scan into ``y`` ``[batch, T, channels]`` and ``after`` ``[batch, channels, n]``; returns peaks if asked for."""
    A, x, dt, B, C = plain_floats(given.A), *(laid_out(o) for o in (given.x, given.dt, given.B, given.C))
    D, dt_bias = (None if p is None else plain_floats(p) for p in (given.D, given.dt_bias))
    z = _ABSENT if given.z is None else laid_out(given.z)
    scan = Scan(x, dt, A, B, C, D, z, dt_bias, *given.dt_limit)
    if peaks_every is None and _suits_products(given):
        _scan_in_chunks(scan, given, after, y)
        return None
    return _scan_by_tokens(scan, given, after, y, peaks_every)


def _scan_by_tokens(
    scan: Scan, given: Recurrence, after: Tensor | None, y: Tensor, peaks_every: int | None
) -> Tensor | None:
    batch, tokens, channels = y.shape
    _, _, groups, n = scan.B.data.shape
    heads, per_group = scan.A.shape[0], channels // groups
    states = _power_of_2(n)
    block = min(max(1, (_STATES if tokens > 1 else _STATES_OF_ONE) // states), _power_of_2(per_group))
    blocks = _parts(per_group, block)
    window, peaks = peaks_every or 1, None
    if peaks_every is not None:
        peaks = torch.empty(batch, _parts(tokens, window), channels, n, device=y.device)
    length = _segment(tokens, batch * groups * blocks, window)
    segments = _parts(tokens, length)
    sizes = tokens, length, blocks, per_group, channels // heads, n, window
    constants: dict[str, Any] = {
        "OWN": scan.A.dim() == 2, "CHANNELS": block, "STATES": states,
        "RUN": min(_TOKENS_AT_ONCE, _power_of_2(length)),
    }  # fmt: skip
    grid = groups * blocks, segments, batch
    out, scale = (y, y.stride(0)), _state_scale(given)
    if segments == 1:
        _launch(scan_tokens, grid, (*scan, given.state, after, scale, None, *out, peaks, *sizes), constants, y, 1)
        return peaks
    between = torch.empty(batch, segments, channels, n, device=y.device)
    sums = torch.empty(batch, segments, heads, device=y.device)
    _launch(scan_tokens, grid, (*scan, None, between, None, sums, None, 0, None, *sizes), constants, y, 1)
    _chain(scan, given, after, between, sums)
    _launch(scan_tokens, grid, (*scan, between, None, None, None, *out, peaks, *sizes), constants, y, 1)
    return peaks


def _scan_in_chunks(scan: Scan, given: Recurrence, after: Tensor | None, y: Tensor) -> None:
    batch, tokens, channels = y.shape
    _, _, groups, n = scan.B.data.shape
    heads = scan.A.shape[0]
    width, chunks = channels // heads, _parts(tokens, _CHUNK)
    between = torch.empty(batch, chunks, channels, n, device=y.device)
    sums = torch.empty(batch, chunks, heads, device=y.device)
    sizes = tokens, heads, heads // groups, width, n
    # bfloat16 is coarser than the factors of a tf32 product; others take three products, for the digits it drops
    coarse = all(o.data.dtype == torch.bfloat16 for o in (scan.x, scan.B, scan.C))
    constants: dict[str, Any] = {
        "TOKENS": _CHUNK, "WIDTH": _power_of_2(width), "STATES": _power_of_2(n),
        "PRECISION": "tf32" if coarse else "tf32x3",
    }  # fmt: skip
    x, dt, A, B, _, _, _, *steps = scan
    grid = heads, chunks, batch
    _launch(chunk_states, grid, (x, dt, A, B, *steps, between, sums, *sizes), constants, y, _CHUNK_WARPS)
    _chain(scan, given, after, between, sums)
    _launch(chunk_outputs, grid, (*scan, between, y, y.stride(0), *sizes), constants, y, _CHUNK_WARPS)


def _chain(scan: Scan, given: Recurrence, after: Tensor | None, between: Tensor, sums: Tensor) -> None:
    batch, segments, channels, n = between.shape
    states = _power_of_2(n)
    block = max(1, _CHAINED // states)
    sizes = segments, channels, channels // sums.shape[2], n
    arguments = scan.A, given.state, after, _state_scale(given), between, sums, *sizes
    constants = {"OWN": scan.A.dim() == 2, "CHANNELS": block, "STATES": states}
    _launch(chain_states, (_parts(channels, block), batch, 1), arguments, constants, between)


def launch_convolution(given: Convolution, update: bool, y: Tensor) -> None:
    """A convolution into ``y`` ``[batch, T, channels]``, and its last inputs into ``state`` with ``update``."""
    x, weight, bias, state, silu, out_scale = given
    batch, tokens, channels = y.shape
    taps = weight.shape[1]
    slots = _power_of_2(taps)
    kind = "token" if tokens == 1 else "int8" if x.values.dtype == torch.int8 else "float"
    height, width = _CONVOLVED[kind]
    height = height if tokens == 1 else max(height, slots)  # the first tile reaches no further back than the state
    grid = _parts(channels, width), _parts(tokens, height), batch
    out_run = 1 if out_scale is None else channels // out_scale.numel()
    bias, out_scale = (None if values is None else plain_floats(values) for values in (bias, out_scale))
    sizes = tokens, channels, out_run
    arguments = laid_out(x), plain_floats(weight), bias, state, out_scale, y, *sizes
    constants = {
        "TAPS": taps, "SLOTS": slots, "SILU": silu, "UPDATE": update, "TOKENS": height, "CHANNELS": width
    }  # fmt: skip
    _launch(convolve, grid, arguments, constants, y)


def _launch(
    kernel: Any, grid: Grid, arguments: tuple[Any, ...], constants: dict[str, Any], on: Tensor, warps: int = 4
) -> None:
    """On the device of a tensor; the kernel's last parameters are ``constants``, in their order."""
    key = grid, warps, *constants.values()
    launch(kernel, key, arguments, lambda: Plan(grid, (), {**constants, "num_warps": warps}), on)


def _suits_products(given: Recurrence) -> bool:
    """Whether a scan is done a chunk at a time: one decay per head, and sides that the tensor cores take."""
    _, tokens, channels = given.x.values.shape
    sides = channels // given.A.shape[0], given.B.values.shape[3]
    return given.A.dim() == 1 and tokens >= _CHUNK // 2 and min(sides) >= _LEAST_PRODUCT


def _segment(tokens: int, programs: int, window: int) -> int:
    """Tokens of a segment: few where there are few programs; whole windows of peaks."""
    wanted = max(SEGMENT, _power_of_2(_parts(tokens * programs, _PROGRAMS)))
    length = _parts(wanted, window) * window
    return length if tokens > 2 * length else tokens


def _state_scale(given: Recurrence) -> StateScale | None:
    scale, cluster = given.state_scale, given.state_cluster
    if scale is None:
        return None
    scale = plain_floats(scale)
    if cluster is not None:
        cluster = cluster.to(torch.int32).contiguous()
    return StateScale(scale, cluster, scale.shape[1], int(scale.shape[1] > 1))


def _parts(whole: int, part: int) -> int:
    return -(-whole // part)


def _power_of_2(least: int) -> int:
    """The next one; Triton's function for it takes microseconds, at every token."""
    return 1 << max(0, least - 1).bit_length()
