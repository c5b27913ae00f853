"""One layer's scan and convolution, in each way: calls of an index, which chooses among copies of states and decays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hf_lowbit.kernels import Operand, causal_convolution, quantize_codes, selective_scan

# channels, heads, groups, states
MODELS = {
    "mamba-130m": (1536, 1536, 1, 16),
    "mamba-1.4b": (4096, 4096, 1, 16),
    "mamba-2.8b": (5120, 5120, 1, 16),
    "mamba2-130m": (1536, 24, 1, 128),
    "mamba2-1.3b": (4096, 64, 1, 128),
    "mamba2-2.7b": (5120, 80, 1, 128),
}
TAPS = 4
Calls = dict[str, Callable[[int], Any]]


def codes(values: Tensor) -> Operand:
    """Quantized with one scale."""
    scale = values.abs().amax().reshape(1) / 127
    return Operand(quantize_codes(values, scale), scale)


def scan_bytes(name: str, state_bytes: int) -> int:
    """What a scan of one token cannot but move: the state, read and written, and the decays of each state."""
    channels, heads, _, n = MODELS[name]
    return channels * n * 2 * state_bytes + (4 * heads * n if heads == channels else 0)


def scans(name: str, tokens: int, copies: int = 1) -> Calls:
    """The scan of a layer, its state changed in place."""
    channels, heads, groups, n = MODELS[name]
    x, z = torch.randn(1, tokens, channels), torch.randn(1, tokens, channels)
    dt, B, C = torch.randn(1, tokens, heads), torch.randn(1, tokens, groups, n), torch.randn(1, tokens, groups, n)
    A = -torch.rand(copies, heads, n) - 0.1 if heads == channels else -torch.rand(copies, heads) - 0.1
    D, bias, state = torch.randn(heads), torch.randn(heads), torch.randn(copies, 1, channels, n)
    scale = torch.full((1, n), 0.03)
    calls: Calls = {"transformers": transformers_scan(x, dt, A, B, C, D, z, bias, state.clone())}
    inputs = x, dt, B, C, z
    kinds: dict[str, tuple[Any, Tensor, dict[str, Any]]] = {
        "float32": (Operand, state.clone(), {}),
        "int8": (codes, quantize_codes(state, scale), {"state_scale": scale}),
        "reference": (Operand, state.clone(), {"backend": "reference"}),
    }
    if x.is_cuda:
        kinds["bfloat16"] = (lambda values: Operand(values.bfloat16()), state.clone(), {})
    for way, (make, states, more) in kinds.items():
        calls[way] = _scan([make(v) for v in inputs], A, D, states, {"dt_bias": bias, "update": True, **more})
    return calls


def _scan(inputs: list[Operand], A: Tensor, D: Tensor, states: Tensor, more: dict[str, Any]) -> Callable[[int], Any]:
    x, dt, B, C, z = inputs
    return lambda i: selective_scan(x, dt, A[i], B, C, D, z=z, state=states[i], **more)


def transformers_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, bias: Tensor, state: Tensor
) -> Callable[[int], Any]:
    """transformers' function for so many tokens. Mamba-2's gate is in its norm there: multiplied here."""
    from transformers.models.mamba import modeling_mamba as first
    from transformers.models.mamba2 import modeling_mamba2 as second

    tokens, heads, width = x.shape[1], A.shape[1], x.shape[2] // A.shape[1]
    if A.dim() == 3:
        if tokens == 1:
            update = first.mamba_selective_state_update
            rest = D, bias, True, z[:, 0]
            return lambda i: update(state[i], x[:, 0], dt[:, 0], A[i], B[:, 0, 0], C[:, 0, 0], *rest)
        turned = [v.flatten(2).mT.contiguous() for v in (x, dt)]
        b, c, gate = (v.flatten(2).mT.contiguous() for v in (B, C, z))
        more = {"delta_bias": bias, "delta_softplus": True, "return_last_state": True}
        return lambda i: first.mamba_selective_scan(*turned, A[i], b, c, D, gate, **more)
    if tokens == 1:
        states = state.unflatten(2, (heads, width))
        wide = [v[..., None].expand(*v.shape, width) for v in (dt[:, 0], D, bias)]
        decays = A[:, :, None, None].expand(-1, heads, width, B.shape[3])
        one, gate = x.view(1, heads, width), torch.nn.functional.silu(z.view(1, heads, width))
        step = second.mamba2_selective_state_update
        return lambda i: step(states[i], one, wide[0], decays[i], B[:, 0], C[:, 0], wide[1], wide[2], True) * gate
    split = x.unflatten(2, (heads, width)), dt
    more = {"D": D, "dt_bias": bias, "dt_softplus": True, "return_final_states": True}
    scan = second.mamba2_chunk_scan
    return lambda i: scan(*split, A[i], B, C, chunk_size=256, **more)[0].flatten(2) * torch.nn.functional.silu(z)


def convolutions(name: str, tokens: int) -> Calls:
    """The convolution of a layer, its state changed in place."""
    from transformers.models.mamba.modeling_mamba import causal_conv1d_fn, causal_conv1d_update

    channels, heads, groups, n = MODELS[name]
    channels += 0 if heads == channels else 2 * groups * n
    x, weight, bias = torch.randn(1, tokens, channels), torch.randn(channels, TAPS), torch.randn(channels)
    turned, past, one = x.mT.contiguous(), torch.zeros(1, channels, TAPS), torch.tensor([0.03])
    if tokens == 1:
        calls: Calls = {"transformers": lambda i: causal_conv1d_update(turned, past, weight, bias, "silu")}
    else:
        calls = {"transformers": lambda i: causal_conv1d_fn(turned, weight, bias, "silu")}
    kinds: dict[str, tuple[Operand, torch.dtype, dict[str, Any]]] = {
        "float32": (Operand(x), torch.float32, {}),
        "int8": (codes(x), torch.int8, {"out_scale": one}),
        "reference": (Operand(x), torch.float32, {"backend": "reference"}),
    }
    if x.is_cuda:
        kinds["bfloat16"] = (Operand(x.bfloat16()), torch.bfloat16, {})
    for way, (operand, dtype, more) in kinds.items():
        state = torch.zeros(1, channels, TAPS, dtype=dtype)
        calls[way] = _convolution(operand, weight, bias, state, more)
    return calls


def _convolution(x: Operand, weight: Tensor, bias: Tensor, state: Tensor, more: dict[str, Any]) -> Callable[[int], Any]:
    return lambda i: causal_convolution(x, weight, bias, state, update=True, **more)
