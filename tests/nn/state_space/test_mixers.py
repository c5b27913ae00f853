"""Packed mixers by themselves: storage, arithmetic, states, gradients. Whole models: tests/integrations."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from hf_lowbit.formats import WeightSpec
from hf_lowbit.nn import CorruptWeightError, LayerSpec, MixerSpec, PackedMamba, PackedMamba2, PackedMixer
from hf_lowbit.nn.state_space.names import mixer_refusal
from tests.integrations.tiny_state_space import TINY, relative
from tests.nn.state_space.mixers import SPECS, WEIGHTS, children, float_mixer, heard, hidden, packed, unpacked

NAMES = list(SPECS)
SITES = {
    "mamba": ["in", "x", "x_proj", "dt", "state"],
    "falcon_mamba": ["in", "x", "dt_in", "B", "C", "dt", "state"],
    "mamba2": ["z", "conv_x", "conv_B", "conv_C", "dt", "x", "B", "C", "state"],
}


def cache_of(name: str) -> Any:
    return DynamicCache(config=TINY[name].create().config)


def with_backend(mixer: PackedMixer, backend: str | None) -> PackedMixer:
    for module in mixer.modules():
        if hasattr(module, "backend"):
            module.backend = backend
    return mixer


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_eight_bits_are_close_to_floats(name: str) -> None:
    x, stock = hidden(2, 30), float_mixer(name)
    assert relative(unpacked(name, MixerSpec())(x), stock(x)) < 1e-5
    weights = relative(packed(name, MixerSpec())(x), stock(x))
    everything = relative(packed(name)(x), stock(x))
    assert 1e-4 < weights < 0.05 and weights < everything < 0.1


@pytest.mark.parametrize("name", NAMES)
def test_what_is_stored(name: str) -> None:
    mixer = packed(name)
    own = dict(mixer.named_parameters(recurse=False))
    codes = {key for key in own if key.startswith(("A_log", "D", "site_", "head_", "channel_"))}
    assert all(own[key].dtype == torch.int32 for key in codes)
    assert set(own) - codes == ({"dt_bias"} if mixer.generation == 2 else set())
    assert list(mixer.sites()) == SITES[name]
    assert {f"site_{site}_scale" for site in mixer.sites()} <= codes
    mixer.check()
    before = {key: value.clone() for key, value in mixer.state_dict().items()}
    mixer.half()
    assert all(torch.equal(before[key], own[key]) for key in codes)  # no cast reaches them


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_a_state_dict_holds_all_of_it(name: str) -> None:
    mixer, other = packed(name), packed(name)
    for key, value in other.state_dict().items():  # destroyed, so that nothing is left of it
        value.zero_() if not key.endswith("ends") else None
    other.load_state_dict(mixer.state_dict())
    x = hidden(2, 9)
    assert torch.equal(mixer(x), other(x))
    for copied in (copy.deepcopy(mixer), pickle.loads(pickle.dumps(mixer))):
        assert torch.equal(mixer(x), copied(x))


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_simulated_and_integer_paths_agree(name: str) -> None:
    """What is told to a listener is computed in floats on the grids; without, in codes; natively, or with torch."""
    x, mixer = hidden(2, 50), packed(name)
    integer = mixer(x)
    with_backend(mixer, "reference")
    reference = mixer(x)
    mixer.listener = lambda site, values: None
    simulated = mixer(x)
    mixer.listener = None
    assert relative(simulated, reference) < 1e-3
    assert relative(integer, reference) < 1e-2  # a rounding that falls the other way moves an output by a code


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_a_listener_hears_every_site(name: str) -> None:
    mixer, x = packed(name), hidden(2, 20)
    told, geometry = heard(mixer, x), mixer.geometry
    assert set(told) == set(mixer.sites())
    assert all(values.is_floating_point() for values in told.values())
    assert told["state"].shape == (2, 2, geometry.intermediate, geometry.state)  # of 16 tokens, and of 4
    assert told["x"].shape == (2, 20, geometry.intermediate)
    assert told["dt"].shape == (2, 20, geometry.heads)
    if "B" in told:
        assert told["B"].shape == (2, 20, geometry.groups, geometry.state)
    assert "listener" not in vars(copy.deepcopy(mixer))


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", [None, "reference"])
def test_states_are_int8_and_a_prefill_continues(name: str, backend: str | None) -> None:
    """Token by token is what a prefill computes, but for the states that are rounded between the tokens."""
    mixer, x = with_backend(packed(name), backend), hidden(2, 20)
    cache, whole = cache_of(name), mixer(x)
    parts = [mixer(part, cache_params=cache) for part in x.split([9, *[1] * 8, 3], 1)]
    assert cache.get_conv_state(0).dtype == cache.get_recurrent_state(0).dtype == torch.int8
    assert torch.equal(parts[0], mixer(x[:, :9]))
    assert relative(torch.cat(parts, 1), whole) < 0.1
    exact = MixerSpec(
        8, None, *(getattr(SPECS[name], f) for f in ("group_scales", "head_clusters", "channel_clusters"))
    )
    mixer, cache = with_backend(packed(name, exact), backend), cache_of(name)
    parts = [mixer(part, cache_params=cache) for part in x.split([9, *[1] * 8, 3], 1)]
    assert cache.get_recurrent_state(0).dtype == torch.float32
    assert relative(torch.cat(parts, 1), mixer(x)) < 2e-2  # only sums in another order, and what rounds otherwise


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_states_in_place(name: str) -> None:
    """A step changes the cache's own tensors: their addresses are static."""
    mixer, cache = packed(name), cache_of(name)
    mixer(hidden(2, 5), cache_params=cache)
    states = cache.get_conv_state(0), cache.get_recurrent_state(0)
    before = [state.clone() for state in states]
    mixer(hidden(2, 1, seed=3), cache_params=cache)
    assert cache.get_conv_state(0) is states[0] and cache.get_recurrent_state(0) is states[1]
    assert torch.equal(states[0][..., :-1], before[0][..., 1:]) and not torch.equal(states[1], before[1])


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_a_cache_of_another_model_is_refused(name: str) -> None:
    for first, second in ((unpacked(name, MixerSpec()), packed(name)), (packed(name), unpacked(name, MixerSpec()))):
        cache = cache_of(name)
        first(hidden(1, 5), cache_params=cache)
        with pytest.raises(ValueError, match="layer 0: the cache holds a convolution state of"):
            second(hidden(1, 1), cache_params=cache)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_padding_changes_no_state(name: str) -> None:
    mixer, x = packed(name), hidden(2, 12)
    for layer in (mixer.in_proj,):
        layer.bias = None  # the library's convolution reads it, too
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :4] = 0
    cache, alone = cache_of(name), cache_of(name)
    y = mixer(x, cache_params=cache, attention_mask=mask)
    assert relative(y[0, 4:], mixer(x[:1, 4:], cache_params=alone)[0]) < 1e-4  # more tokens are summed in another order
    states, expected = cache.get_recurrent_state(0)[:1].int(), alone.get_recurrent_state(0).int()
    assert (states - expected).abs().max() <= 1 and (states != expected).float().mean() < 0.01
    assert (states - cache.get_recurrent_state(0)[1:].int()).abs().max() > 10, "a comparison that tells states apart"


@pytest.mark.parametrize("name", NAMES)
def test_gradients_pass_the_rounding(name: str) -> None:
    """They are about those of the float mixer with the same weights, and forward is as without gradients."""
    mixer = packed(name)
    plain = packed(name, MixerSpec())
    found = []
    for module in (mixer, plain):
        x = hidden(2, 12).requires_grad_()
        y = module(x)
        (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
        assert x.grad is not None
        found.append(x.grad)
    assert relative(found[0], found[1]) < 0.15
    with torch.no_grad():
        quiet = mixer(hidden(2, 12))
    assert relative(mixer(hidden(2, 12).requires_grad_()).detach(), quiet) < 1e-2


@pytest.mark.parametrize("name", NAMES)
def test_gradients_after_inference(name: str) -> None:
    """What is remembered in inference mode can be part of a graph."""
    mixer = packed(name)
    with torch.inference_mode():
        mixer(hidden(1, 6))
    x = hidden(1, 6).requires_grad_()
    mixer(x).sum().backward()
    assert x.grad is not None and bool(x.grad.any())


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_what_is_remembered_follows_what_changes(name: str) -> None:
    mixer, x = packed(name), hidden(1, 6)
    before = mixer(x)
    ready = mixer._ready()
    assert mixer._ready() is ready
    scale = mixer.site_scale("dt")
    assert scale is not None
    mixer.set_site_scale("dt", 3 * scale)
    assert not torch.equal(mixer(x), before)
    mixer.set_site_scale("dt", scale)
    assert torch.equal(mixer(x), before)
    mixer.get_parameter("D_scale").copy_((2 * mixer.get_parameter("D_scale").view(torch.float32)).view(torch.int32))
    assert not torch.equal(mixer(x), before)
    mixer.get_parameter("D_scale").copy_((mixer.get_parameter("D_scale").view(torch.float32) / 2).view(torch.int32))
    children(mixer)["conv1d"].weight.zero_()
    assert not torch.equal(mixer(x), before)


@pytest.mark.parametrize("name", NAMES)
def test_back_to_the_library(name: str) -> None:
    mixer, stock = packed(name, MixerSpec()), float_mixer(name)
    for child, layer in children(mixer).items():
        if hasattr(layer, "to_float"):
            setattr(mixer, child, layer.to_float(torch.float32))
    back = mixer.to_float(torch.float32)
    assert type(back) is type(stock) and set(back.state_dict()) == set(stock.state_dict())
    x = hidden(2, 9)
    with torch.no_grad():
        assert relative(back(x), mixer(x)) < 1e-5
    assert back.A_log.shape == stock.A_log.shape and back.layer_idx == stock.layer_idx
    assert mixer.to_float(torch.float16).A_log.dtype == torch.float16


def test_children_are_shared() -> None:
    """What is put in a child's place, before or after, is in both: undoing relies on it."""
    module = float_mixer("mamba")
    mixer = PackedMamba.from_float(module, LayerSpec(WEIGHTS, mixer=MixerSpec()))
    module.in_proj = nn.Linear(32, 128)
    assert mixer.in_proj is module.in_proj


@pytest.mark.parametrize("name", NAMES)
def test_scales_that_are_refused(name: str) -> None:
    mixer = packed(name)
    with pytest.raises(ValueError, match="no site 'nothing'; it has "):
        mixer.set_site_scale("nothing", torch.ones(1))
    with pytest.raises(ValueError, match=r"of 'dt' is \[1\], not \[2\]"):
        mixer.set_site_scale("dt", torch.ones(2))
    for value in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="finite and positive"):
            mixer.set_site_scale("dt", torch.tensor([value]))
    with pytest.raises(ValueError, match="computes in floats"):
        packed(name, MixerSpec()).set_site_scale("dt", torch.ones(1))


@pytest.mark.parametrize("name", NAMES)
def test_damage_is_noticed(name: str) -> None:
    mixer = packed(name)
    mixer.get_parameter("site_x_scale").zero_()
    with pytest.raises(CorruptWeightError, match="site_x_scale holds values that are not finite and positive"):
        mixer.check()
    del mixer.site_x_scale
    with pytest.raises(CorruptWeightError, match="site_x_scale is missing"):
        mixer.check()
    mixer = packed(name)
    mixer.register_parameter("site_dt_scale", nn.Parameter(torch.ones(2, dtype=torch.int32), requires_grad=False))
    with pytest.raises(CorruptWeightError, match=r"site_dt_scale is \(2,\)"):
        mixer.check()


def test_clusters_that_are_refused() -> None:
    mixer = packed("mamba2")
    head_ends, channel_ends = mixer.get_parameter("head_ends"), mixer.get_parameter("channel_ends")
    with pytest.raises(ValueError, match="head_ends must ascend"):
        mixer.set_clusters(torch.zeros_like(head_ends), channel_ends)
    with pytest.raises(ValueError, match="channel_ends is"):
        mixer.set_clusters(head_ends, channel_ends[..., :1])
    head_ends[0, -1] = 7
    with pytest.raises(CorruptWeightError, match="head_ends must ascend"):
        mixer.check()
    for clusters, told in (((3, 2), "head_clusters=3 exceeds the 2 heads"), ((2, 17), "channel_clusters=17 exceeds")):
        with pytest.raises(ValueError, match=told):
            unpacked("mamba2", MixerSpec(8, 8, True, *clusters))
    with pytest.raises(ValueError, match="generation 1"):
        unpacked("mamba", MixerSpec(8, 8, True))


def test_modules_that_are_no_such_mixer() -> None:
    spec = LayerSpec(WeightSpec(bits=8), mixer=MixerSpec())
    with pytest.raises(TypeError, match="generation 1, not 2"):
        PackedMamba2.from_float(float_mixer("mamba"), spec)
    with pytest.raises(TypeError, match="Linear"):
        PackedMamba.from_float(nn.Linear(2, 2), spec)
    module = float_mixer("mamba")
    module.activation = "gelu"
    with pytest.raises(TypeError, match="activation 'gelu'"):
        PackedMamba.from_float(module, spec)


def test_mixers_that_are_unknown() -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.A_log, self.D = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))

    assert mixer_refusal(Other()) == "Other is no mixer that is known"
    assert mixer_refusal(nn.Linear(2, 2)) is None and mixer_refusal(float_mixer("mamba2")) is None


@torch.no_grad()
def test_clusters_of_one_are_a_scale_for_each_state_group() -> None:
    """Quamba2's test 3: with one cluster of all heads and channels, x has the scale of its state group."""
    mixer = packed("mamba2", MixerSpec(8, None, False, 1, 1))
    x = heard(mixer, hidden(2, 20))["x"].unflatten(-1, (mixer.geometry.groups, -1))
    largest = x.abs().amax((0, 1, 3))
    mixer.set_site_scale("x", largest[:, None, None] / 127)
    scales: Tensor = mixer._ready().scales["x"]
    assert torch.equal(scales.view(mixer.geometry.groups, -1), (largest / 127)[:, None].expand(-1, 32))
