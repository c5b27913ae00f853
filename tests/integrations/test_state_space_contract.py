"""The contract with transformers' state-space mixers: every name, order and habit that the packed mixers rely on.

When a release moves one, the test that fails names it.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F
from transformers import DynamicCache, StaticCache

from tests.integrations.tiny_state_space import TINY, mixers_of, relative, tokens

# Classes with an A_log of their own that are not selective scans of Mamba's: a gate's decay in linear attention.
_OTHER_DECAYS = {
    "BailingHybridForgetGate",
    "Glm5NextTextForgetGate",
    "KimiLinearForgetGate",
    "OlmoHybridGatedDeltaNet",
    "Qwen3NextGatedDeltaNet",
    "Qwen3_5GatedDeltaNet",
    "Qwen3_5MoeGatedDeltaNet",
    "Qwen4ExpTextGatedDeltaNet",
}
_REFUSED = {"ZambaMambaMixer"}


def first_mixer(name: str) -> Any:
    return next(iter(mixers_of(TINY[name].create(), TINY[name].mixer).values()))


def test_every_class_with_a_decay_is_known() -> None:
    """One that is new in transformers is either packed, or refused with a reason, or no selective scan."""
    owners: set[str] = set()
    for file in (Path(transformers.__file__).parent / "models").glob("*/modeling_*.py"):
        for cls, body in re.findall(
            r"^class (\w+)(.*?)(?=^class |\Z)", file.read_text("utf-8"), re.DOTALL | re.MULTILINE
        ):
            if re.search(r"self\.A_log = ", body):
                owners.add(cls)
    assert owners == {tiny.mixer for tiny in TINY.values()} | _REFUSED | _OTHER_DECAYS


@pytest.mark.parametrize("name", TINY)
def test_mixers_are_called_with_these_arguments(name: str) -> None:
    forward = inspect.signature(type(first_mixer(name)).forward).parameters
    assert list(forward)[:4] == ["self", "hidden_states", "cache_params", "attention_mask"]
    assert forward["cache_params"].default is None and forward["attention_mask"].default is None


@pytest.mark.parametrize("name", TINY)
def test_mixers_have_these_children(name: str) -> None:
    mixer = first_mixer(name)
    width, state, taps = mixer.intermediate_size, mixer.ssm_state_size, mixer.conv_kernel_size
    assert type(mixer.in_proj) is type(mixer.out_proj) is nn.Linear and type(mixer.conv1d) is nn.Conv1d
    assert type(mixer.layer_idx) is int and isinstance(mixer.act, nn.Module)
    assert mixer.out_proj.in_features == width
    if TINY[name].generation == 1:
        rank = mixer.time_step_rank
        assert mixer.in_proj.out_features == 2 * width
        assert tuple(mixer.conv1d.weight.shape) == (width, 1, taps)
        assert tuple(mixer.x_proj.weight.shape) == (rank + 2 * state, width)
        assert tuple(mixer.dt_proj.weight.shape) == (width, rank) and mixer.dt_proj.bias is not None
        assert tuple(mixer.A_log.shape) == (width, state) and tuple(mixer.D.shape) == (width,)
        norms = [getattr(mixer, f"{site}_layernorm", None) for site in ("dt", "b", "c")]
        assert all(isinstance(norm, nn.Module) for norm in norms) or norms == [None] * 3
    else:
        heads, groups = mixer.num_heads, mixer.n_groups
        channels = width + 2 * groups * state
        assert heads * mixer.head_dim == width
        assert mixer.in_proj.out_features == width + channels + heads
        assert tuple(mixer.conv1d.weight.shape) == (channels, 1, taps)
        assert tuple(mixer.A_log.shape) == tuple(mixer.D.shape) == tuple(mixer.dt_bias.shape) == (heads,)
        assert len(mixer.time_step_limit) == 2
        assert isinstance(mixer.norm, nn.Module)


def test_falcon_h1_multiplies_before_and_behind_in_proj() -> None:
    mixer = first_mixer("falcon_h1")
    assert mixer.ssm_in_multiplier == 1.25
    groups = mixer.n_groups * mixer.ssm_state_size
    sizes = [mixer.intermediate_size, mixer.intermediate_size, groups, groups, mixer.num_heads]
    parts = mixer.mup_vector.flatten().split(sizes)
    assert [sorted(set(part.tolist())) for part in parts] == [
        [pytest.approx(value)] for value in (0.7, 1.3, 0.9, 1.1, 0.8)
    ]
    assert "mup_vector" in mixer._non_persistent_buffers_set
    assert type(first_mixer("falcon_h1_no_norm").norm) is nn.Identity
    assert first_mixer("falcon_h1_norm_first").norm.norm_before_gate
    assert not mixer.norm.norm_before_gate


def _selective_scan(mixer: Any, x: torch.Tensor) -> torch.Tensor:
    """Mamba and its relatives, one token after the other, in float64: ``[T, hidden]`` to ``[T, hidden]``."""
    width, state = mixer.intermediate_size, mixer.ssm_state_size
    a, skip = -mixer.A_log.exp(), mixer.D
    projected = mixer.in_proj(x)
    xs, z = projected.split([width, width], -1)
    taps = mixer.conv1d.weight[:, 0]
    padded = F.pad(xs.t(), (taps.shape[1] - 1, 0)).unfold(1, taps.shape[1], 1)
    xs = F.silu((padded * taps[:, None]).sum(-1).t() + mixer.conv1d.bias)
    dt, b, c = mixer.x_proj(xs).split([mixer.time_step_rank, state, state], -1)
    if hasattr(mixer, "dt_layernorm"):
        dt, b, c = mixer.dt_layernorm(dt), mixer.b_layernorm(b), mixer.c_layernorm(c)
    dt = F.softplus(mixer.dt_proj(dt))
    h, rows = torch.zeros(width, state, dtype=x.dtype), []
    for t in range(len(x)):
        h = torch.exp(dt[t, :, None] * a) * h + dt[t, :, None] * b[t] * xs[t, :, None]
        rows.append(h @ c[t] + skip * xs[t])
    return mixer.out_proj(torch.stack(rows) * F.silu(z))


def _state_space_dual(mixer: Any, x: torch.Tensor) -> torch.Tensor:
    """Mamba-2 and its relatives, likewise."""
    width, state, heads, groups = mixer.intermediate_size, mixer.ssm_state_size, mixer.num_heads, mixer.n_groups
    projected = mixer.in_proj(x * getattr(mixer, "ssm_in_multiplier", 1))
    projected = projected * (mixer.mup_vector[0] if hasattr(mixer, "mup_vector") else 1)
    z, convolved, dt = projected.split([width, width + 2 * groups * state, heads], -1)
    taps = mixer.conv1d.weight[:, 0]
    padded = F.pad(convolved.t(), (taps.shape[1] - 1, 0)).unfold(1, taps.shape[1], 1)
    convolved = F.silu((padded * taps[:, None]).sum(-1).t() + mixer.conv1d.bias)
    xs, b, c = convolved.split([width, groups * state, groups * state], -1)
    xs = xs.unflatten(-1, (heads, -1))
    b, c = (part.unflatten(-1, (groups, state)).repeat_interleave(heads // groups, 1) for part in (b, c))
    dt = F.softplus(dt + mixer.dt_bias).clamp(*mixer.time_step_limit)
    h, rows = torch.zeros(heads, mixer.head_dim, state, dtype=x.dtype), []
    for t in range(len(x)):
        decay = torch.exp(-mixer.A_log.exp() * dt[t])[:, None, None]
        h = decay * h + dt[t, :, None, None] * xs[t, :, :, None] * b[t, :, None, :]
        rows.append((h @ c[t, :, :, None])[..., 0] + mixer.D[:, None] * xs[t])
    y = torch.stack(rows).flatten(1)
    if isinstance(mixer.norm, nn.Identity):
        return mixer.out_proj(y * F.silu(z))
    first = getattr(mixer.norm, "norm_before_gate", False)
    y = y if first else y * F.silu(z)
    grouped = y.unflatten(-1, (groups, -1))
    grouped = grouped * torch.rsqrt(grouped.square().mean(-1, keepdim=True) + mixer.norm.variance_epsilon)
    y = mixer.norm.weight * grouped.flatten(-2)
    return mixer.out_proj(y * F.silu(z) if first else y)


@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_mixers_compute_this(name: str) -> None:
    """The order of projections, groups, norms, gates and limits: written down once more, in float64."""
    mixer = first_mixer(name)
    x = torch.randn(1, 21, mixer.in_proj.in_features, generator=torch.Generator().manual_seed(2))
    stock = mixer(x)[0]
    wide = mixer.double()
    expected = (_selective_scan if TINY[name].generation == 1 else _state_space_dual)(wide, x[0].double())
    assert relative(stock, expected) < 1e-5


@pytest.mark.parametrize("cache_class", [DynamicCache, StaticCache])
def test_caches_keep_codes(cache_class: Any) -> None:
    """Both states take the type of what they are first given, are None before it, and change in place."""
    model = TINY["mamba2"].create()
    cache = cache_class(config=model.config, **({"max_cache_len": 8} if cache_class is StaticCache else {}))
    assert cache.get_conv_state(0) is None and cache.get_recurrent_state(0) is None
    assert not cache.is_recording_past(0)
    codes = torch.arange(2 * 3 * 2, dtype=torch.int8).reshape(2, 3, 2)
    full = cache.update_conv_state(codes, 0, conv_kernel_size=4)
    assert full.dtype == torch.int8 and torch.equal(full, F.pad(codes, (2, 0)))
    longer = cache.update_conv_state(codes, 0, conv_kernel_size=4)
    assert torch.equal(longer, torch.cat([full, codes], -1))  # left context and all
    state = cache.get_conv_state(0)
    assert torch.equal(state, torch.cat([codes, codes], -1)) and state.dtype == torch.int8
    cache.update_recurrent_state(codes, 0)
    assert cache.get_recurrent_state(0).dtype == torch.int8
    cache.get_recurrent_state(0).fill_(7)
    assert (cache.get_recurrent_state(0) == 7).all()
    cache.reorder_cache(torch.tensor([1, 1]))
    assert torch.equal(cache.get_conv_state(0)[0], state[1])
    cache.reset()
    assert cache.get_conv_state(0) is None and cache.get_recurrent_state(0) is None


@pytest.mark.parametrize("name", TINY)
def test_padding_reaches_the_mixer_as_a_mask_of_the_same_length(name: str) -> None:
    """``[batch, tokens]`` in prefill, and nothing for a single token."""
    model, seen = TINY[name].create(), []
    mixer = next(iter(mixers_of(model, TINY[name].mixer).values()))
    mixer.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True)
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, :3] = 0
    model.generate(tokens(2, 7), attention_mask=mask, max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert torch.equal(seen[0].long(), mask)
    assert seen[1:] == [None, None]


@torch.no_grad()
def test_stock_mamba_forgets_its_state_in_a_second_prefill() -> None:
    """Why the packed mixer is not compared with transformers there: it goes on from the state, as Mamba-2's does."""
    for name, remembers in (("mamba", False), ("mamba2", True)):
        model, x = TINY[name].create(), tokens(1, 16)
        cache = DynamicCache(config=model.config)
        whole = model(x).logits[:, 8:]
        model(x[:, :8], cache_params=cache, use_cache=True)
        parts = model(x[:, 8:], cache_params=cache, use_cache=True).logits
        assert (relative(parts, whole) < 1e-4) == remembers
