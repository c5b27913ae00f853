"""Random inputs of scans and convolutions, and the recurrence as the papers write it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_lowbit.kernels import Operand, causal_convolution, quantize_codes, selective_scan

# heads, channels per head, groups, states, decays of its own per state: Mamba's and Mamba-2's, and odd ones whose
# channels, heads and states end within a tile and a vector
SHAPES = {
    "mamba": (20, 1, 1, 16, True),
    "mamba-2": (8, 24, 2, 64, False),
    "mamba-2, 128 states": (2, 64, 1, 128, False),
    "odd": (6, 5, 3, 71, False),
    "odd, own decays": (6, 3, 2, 5, True),
    "heads with own decays": (6, 4, 2, 40, True),
    "one state": (6, 1, 1, 1, True),
}
# a layer of mamba-130m, of mamba2-130m, and of mamba2-2.7b with several groups
REAL_SHAPES = {
    "mamba-130m": (1536, 1, 1, 16, True),
    "mamba2-130m": (24, 64, 1, 128, False),
    "mamba2-2.7b, groups": (80, 64, 8, 128, False),
}


def scan_inputs(shape: str, batch: int, tokens: int, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Arguments of selective_scan by name: float operands, a state, D, z and a bias."""
    heads, width, groups, n, own = (SHAPES | REAL_SHAPES)[shape]
    g = torch.Generator().manual_seed(tokens)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, dtype=torch.float32).to(dtype)

    channels = heads * width
    return {
        "x": Operand(normal(batch, tokens, channels)),
        "dt": Operand(normal(batch, tokens, heads) * 3),
        "A": -(normal(heads, n) if own else normal(heads)).abs() * 2,
        "B": Operand(normal(batch, tokens, groups, n)),
        "C": Operand(normal(batch, tokens, groups, n)),
        "D": normal(heads),
        "z": Operand(normal(batch, tokens, channels)),
        "dt_bias": normal(heads),
        "dt_limit": (0.01, 4.0),
        "state": normal(batch, channels, n),
    }


def cast(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The same in another type: operands and the state; parameters stay at least float32."""
    wide = torch.promote_types(dtype, torch.float32)
    result: dict[str, Any] = {}
    for name, value in inputs.items():
        if isinstance(value, Operand):
            value = Operand(value.values.to(dtype))
        elif isinstance(value, Tensor):
            value = value.to(wide)
        result[name] = value
    return result


def in_codes(inputs: dict[str, Any], clusters: int) -> dict[str, Any]:
    """As int8 codes: B and C with a scale per group, x one per channel, the others one; the state in clusters."""
    result = dict(inputs)
    for name in ("x", "dt", "B", "C", "z"):
        values = inputs[name].values.float()
        kept = {"x": (2,), "B": (2,), "C": (2,)}.get(name, ())
        rest = [d for d in range(values.dim()) if d not in kept]
        scale = values.abs().amax(rest, keepdim=True).squeeze(0).squeeze(0) * 0.9 / 127
        result[name] = Operand(quantize_codes(values, scale), scale.reshape(-1) if values.dim() == 3 else scale)
    state = inputs["state"].float()
    cluster = torch.arange(state.shape[1], dtype=torch.int32) * clusters // state.shape[1]
    scale = (torch.rand(clusters, state.shape[2], generator=torch.Generator().manual_seed(3)) + 0.5) * 0.03
    return result | {
        "state": quantize_codes(state, scale[cluster]),
        "state_scale": scale,
        "state_cluster": cluster,
    }


def restored(inputs: dict[str, Any]) -> dict[str, Any]:
    """The float64 values that the codes of :func:`in_codes` stand for, with a float state."""
    result = dict(inputs)
    for name, value in inputs.items():
        if isinstance(value, Operand) and value.scale is not None:
            result[name] = Operand((value.values.float() * value.scale).double())
        elif isinstance(value, Tensor) and value.is_floating_point():
            result[name] = value.double()
    scale = inputs["state_scale"][inputs["state_cluster"]]
    result["state"] = (inputs["state"].float() * scale).double()
    del result["state_scale"], result["state_cluster"]
    return result


def by_tokens(inputs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Output, last state and all magnitudes of states, one token after the other."""
    x, dt, B, C, z = (inputs[name].values for name in ("x", "dt", "B", "C", "z"))
    heads, per_group = dt.shape[2], dt.shape[2] // B.shape[2]
    A = inputs["A"] if inputs["A"].dim() == 2 else inputs["A"][:, None]
    h = inputs["state"].unflatten(1, (heads, -1))
    outputs, sizes = [], []
    for t in range(x.shape[1]):
        step = F.softplus(dt[:, t] + inputs["dt_bias"]).clamp(*inputs["dt_limit"])
        token = x[:, t].unflatten(1, (heads, -1))
        b, c = (v[:, t].repeat_interleave(per_group, 1)[:, :, None] for v in (B, C))
        h = torch.exp(step[..., None] * A)[:, :, None] * h + (step[..., None] * token)[..., None] * b
        outputs.append(((h * c).sum(-1) + inputs["D"][:, None] * token).flatten(1))
        sizes.append(h.abs().flatten(1, 2))
    return torch.stack(outputs, 1) * F.silu(z), h.flatten(1, 2), torch.stack(sizes, 1)


def relative(value: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    return float((value.double() - expected.double()).norm() / expected.double().norm())


class Mixer(nn.Module):
    """Both operators with a cache, as a decode step calls them, and a convolution without."""

    def __init__(self, backend: str | None) -> None:
        super().__init__()
        self.backend = backend

    def forward(self, inputs: dict[str, Any], weight: Tensor, past: Tensor) -> tuple[Tensor, ...]:
        own = {"backend": self.backend}
        x = Operand(causal_convolution(inputs["x"], weight, None, past, update=True, **own))
        result = selective_scan(**{**inputs, "x": x}, update=True, peaks_every=4, **own)
        other = selective_scan(**{**inputs, "x": x}, return_state=True, **own)
        assert result.state is not None and result.peaks is not None and other.state is not None
        fresh = causal_convolution(inputs["x"], weight, None, **own)
        return result.output, result.state, result.peaks, other.state, fresh


def moved(inputs: dict[str, Any], device: str) -> dict[str, Any]:
    """The same on a device."""
    result: dict[str, Any] = {}
    for name, value in inputs.items():
        if isinstance(value, Operand):
            value = Operand(*(None if part is None else part.to(device) for part in value))
        elif isinstance(value, Tensor):
            value = value.to(device)
        result[name] = value
    return result


@torch.no_grad()
def compare_traced(coded: bool, backend: str | None = None, device: str = "cpu", compiler: str = "aot_eager") -> None:
    """A :class:`Mixer` in one graph, against itself in Python: what it returns, and the states it changes."""
    inputs = cast(scan_inputs("mamba", 2, 6), torch.float32)
    inputs = moved(in_codes(inputs, clusters=2) if coded else inputs, device)
    weight = torch.randn(20, 4, device=device)
    past = torch.zeros(2, 20, 4, dtype=torch.int8 if coded else torch.float32, device=device)

    def fresh() -> tuple[Any, ...]:
        return {**inputs, "state": inputs["state"].clone()}, weight, past.clone()

    given, compiled_given = fresh(), fresh()
    expected = Mixer(backend)(*given)
    results = torch.compile(Mixer(backend), fullgraph=True, backend=compiler)(*compiled_given)
    for result, one in zip(results, expected, strict=True):
        assert torch.equal(result, one)
    assert torch.equal(given[0]["state"], compiled_given[0]["state"]) and torch.equal(given[2], compiled_given[2])
    assert not torch.equal(given[2], past)


def lying_apart(inputs: dict[str, Any]) -> list[dict[str, Operand]]:
    """The same values as parts of a projection's output, as mixers split it, and in layouts that have to be copied."""
    names = ("z", "x", "B", "C", "dt")
    sizes = [inputs[name].values.flatten(2).shape[2] for name in names]
    parts = torch.cat([inputs[name].values.flatten(2) for name in names], 2).split(sizes, 2)
    split = {name: Operand(part.view(inputs[name].values.shape)) for name, part in zip(names, parts, strict=True)}
    turned = {
        name: Operand(inputs[name].values.transpose(-1, -2).contiguous().transpose(-1, -2)) for name in ("x", "B", "C")
    }
    return [split, turned]


def extreme_inputs() -> dict[str, Any]:
    """Steps and gates whose exponentials leave the range of floats."""
    inputs = cast(scan_inputs("mamba", 1, 5), torch.float32) | {"dt_limit": (0.0, float("inf"))}
    inputs["dt"] = Operand(torch.tensor([-200.0, -30.0, 0.0, 30.0, 200.0]).view(1, 5, 1).expand(1, 5, 20))
    inputs["z"] = Operand(torch.linspace(-120, 120, 100).view(1, 5, 20))
    return inputs
