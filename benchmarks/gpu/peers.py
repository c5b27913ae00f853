"""Products of other libraries with 4-bit weights, in groups of 128 where they have them, timed as ours are.

Each builder makes a layer from the integer codes that ours would have; what a builder or a call raises is its result.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gpu.timing import calls, cold_count, microseconds
from hf_lowbit.formats import PackedTensor, WeightSpec, decode, unpack_codes
from hf_lowbit.formats.packed import scales
from hf_lowbit.rounding import round_to_nearest

GROUP = 128
SPEC = WeightSpec(bits=4, group_size=GROUP)
_INNER_TILES = 8  # of the tensor cores, in torch's layout: what torchao takes
_MOST_ERROR = 0.02  # of a product, relative: bfloat16 sums in another order; NF4 is another format

Layer = Callable[[Tensor], Tensor]


class Peer(NamedTuple):
    """A library.

    Attributes:
        package: whose version is told.
        build: makes a layer.
        has_our_codes: so that it has to compute what ours does.
        shapes: of how many of the matrices it is measured; fewer where each takes a minute of tuning.
    """

    package: str
    build: Callable[[PackedTensor], Layer]
    has_our_codes: bool = True
    shapes: int = 4


def _codes(packed: PackedTensor) -> Tensor:
    """uint8 ``[rows, columns]``, 0..15, whose zero is 8."""
    return unpack_codes(packed.weight, packed.spec.bits, packed.columns)


def torch_int4(packed: PackedTensor) -> Layer:
    """torch's own, which torchao and HQQ call: two codes a byte, scales and zeros ``[groups, rows, 2]``."""
    codes = _codes(packed).int()
    weight = torch.ops.aten._convert_weight_to_int4pack((codes[:, ::2] << 4 | codes[:, 1::2]).byte(), _INNER_TILES)
    scale = scales(packed).bfloat16()
    together = torch.stack((scale, torch.zeros_like(scale)), -1).transpose(0, 1).contiguous()
    return lambda x: torch.ops.aten._weight_int4pack_mm(x, weight, GROUP, together)


def torchao_int4(packed: PackedTensor) -> Layer:
    """`Int4WeightOnlyConfig` in the packing that needs no further package. Codes are its own: it has a zero point."""
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    layer = torch.nn.Linear(packed.columns, packed.weight.shape[0], bias=False, device="cuda", dtype=torch.bfloat16)
    layer.weight = torch.nn.Parameter(decode(packed, torch.bfloat16), requires_grad=False)
    quantize_(layer, Int4WeightOnlyConfig(group_size=GROUP, int4_packing_format="tile_packed_to_4d"))
    return layer


def gemlite(packed: PackedTensor) -> Layer:
    """`A16Wn`; each number of tokens is tuned at its first call."""
    from gemlite.helper import A16Wn

    scale = scales(packed).bfloat16()
    zeros = torch.full_like(scale, 8)
    return A16Wn(device="cuda", dtype=torch.bfloat16).from_weights(_codes(packed), scale, zeros, 4, GROUP)


def humming(packed: PackedTensor) -> Layer:
    """humming-kernels, which compiles a kernel for the shape with NVRTC; our words and scales are what it loads."""
    from humming.layer import HummingLayer

    layer = HummingLayer(
        packed.weight.shape[0], packed.columns, {"dtype": "int4", "group_size": GROUP}, torch_dtype=torch.bfloat16
    )
    layer = layer.cuda()
    layer.load_from_tensors({"weight": packed.weight, "weight_scale": scales(packed).bfloat16()})
    layer.transform()
    return layer


def bitsandbytes(packed: PackedTensor) -> Layer:
    """NF4 with float32 scales in groups of 64: another format of as many bits."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    rows, columns = packed.weight.shape[0], packed.columns
    layer = Linear4bit(columns, rows, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    weight = decode(packed, torch.bfloat16)
    layer.weight = Params4bit(weight, requires_grad=False, quant_type="nf4", module=layer)
    return layer.to("cuda")


PEERS = {
    "torch int4": Peer("torch", torch_int4),
    "torchao int4": Peer("torchao", torchao_int4, has_our_codes=False),
    "gemlite int4": Peer("gemlite", gemlite, shapes=1),
    "humming int4": Peer("humming-kernels", humming),
    "bitsandbytes NF4": Peer("bitsandbytes", bitsandbytes, has_our_codes=False),
}


def version(peer: Peer) -> str | None:
    """Of its package; None where it is not installed."""
    try:
        return importlib.metadata.version(peer.package)
    except importlib.metadata.PackageNotFoundError:
        return None


def measure(name: str, rows: int, columns: int, floats: Mapping[int, float]) -> Iterator[dict[str, Any]]:
    """A row per number of tokens, or one that says what failed.

    A layer with our codes has to compute what ours does: one that is fast and wrong is no peer.
    """
    peer, generator = PEERS[name], torch.Generator("cuda").manual_seed(0)
    row: dict[str, Any] = {"shape": [rows, columns], "weight": name}
    if version(peer) is None:
        yield {**row, "failed": f"{peer.package} is not installed"}
        return
    size = rows * columns // 2
    weight = 0.02 * torch.randn(rows, columns, device="cuda", generator=generator)
    packed = round_to_nearest(weight, SPEC)
    try:
        cold = [peer.build(packed) for _ in range(cold_count(size))]
    except Exception as error:
        yield {**row, "failed": _told(error)}
        return
    expected = decode(packed).t()
    for tokens, float_us in floats.items():
        x = torch.randn(tokens, columns, device="cuda", dtype=torch.bfloat16, generator=generator)
        try:
            with torch.inference_mode():
                y, exact = cold[0](x).float(), x.float() @ expected
                error = float((y - exact).norm() / exact.norm())
                if peer.has_our_codes and not error <= _MOST_ERROR:
                    raise ArithmeticError(f"{error:.3f} off, relative")
                call = lambda i, x=x: cold[i % len(cold)](x)  # noqa: E731
                us = microseconds(call, calls(len(cold), tokens))
        except Exception as error:
            yield {**row, "tokens": tokens, "failed": _told(error)}
            continue
        yield {**row, "tokens": tokens, "kernel": name, "us": us, "bfloat16_us": float_us, "error": error}


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
