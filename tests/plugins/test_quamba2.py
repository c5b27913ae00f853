"""Quamba2: the numbered tests of its method page, and what becomes of a model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_lowbit
from hf_lowbit.calibration.block import Block
from hf_lowbit.calibration.mixers import mixers_of, pack_mixers, rotate_outputs
from hf_lowbit.calibration.reordering import channel_magnitudes, reorder_mixer
from hf_lowbit.calibration.state_space import set_mixer_scales
from hf_lowbit.kernels import quantize_codes
from hf_lowbit.nn import Hadamard, PackedLinear
from hf_lowbit.nn.state_space.geometry import channel_clusters
from hf_lowbit.plan import packed_modules
from hf_lowbit_quamba import QuambaConfig
from hf_lowbit_quamba2 import Quamba2Config
from tests.integrations.tiny_state_space import relative, step, tokens
from tests.matrix.models import fingerprint
from tests.plugins.outliers import walk
from tests.plugins.quamba2_models import (
    W4A8,
    W4A16,
    batches,
    logits_of,
    mixer_of,
    quantized,
    uneven_mamba2,
)


# 1, 2
@torch.no_grad()
def test_the_rewritten_model_computes_the_same() -> None:
    """Reordered, with output projections whose inputs are rotated online: in prefill and with a cache."""
    original = uneven_mamba2()
    blocks: list[nn.Module] = []

    def rewrite(block: Block) -> None:
        for name, mixer in mixers_of(block).items():
            reorder_mixer(block, name, mixer, (2, 4))
        rotate_outputs(block)
        layer = block.matrices["mixer.out_proj.weight"].skeleton
        assert isinstance(layer, PackedLinear) and layer.layer_spec.transform == Hadamard(64)
        changed = copy.deepcopy(block.module)
        projection: Any = changed.get_submodule("mixer.out_proj")
        projection.weight.data = block.matrices["mixer.out_proj.weight"].weight.clone()
        projection.register_forward_pre_hook(lambda module, args: (layer.transformed(args[0]),))
        blocks.append(changed)

    walk(copy.deepcopy(original), rewrite, batches(), Quamba2Config())
    model, x = copy.deepcopy(original), tokens(2, 24, seed=9)
    model.backbone.layers = nn.ModuleList(blocks)
    assert all(
        not torch.equal(new.mixer.in_proj.weight, old.mixer.in_proj.weight)
        for new, old in zip(model.backbone.layers, original.backbone.layers, strict=True)
    )
    assert relative(model(x).logits, original(x).logits) < 1e-5
    caches = [m(x[:, :20], use_cache=True).cache_params for m in (model, original)]
    for token in range(20, 24):
        new, old = (step(m, x[:, token : token + 1], cache) for m, cache in zip((model, original), caches, strict=True))
        assert relative(new, old) < 1e-5


# 3
@pytest.mark.parametrize("clusters", [(1, 1), (2, 4)])
def test_a_scale_covers_its_cluster(clusters: tuple[int, int]) -> None:
    """With one cluster each state group has the largest |x| of its own."""
    seen = []

    def check(block: Block) -> None:
        (name, mixer), *_ = mixers_of(block).items()
        order = reorder_mixer(block, name, mixer, clusters, "max")
        mixer.set_clusters(order.head_ends, order.channel_ends)
        peaks = channel_magnitudes(block, name, mixer, "max").view(2, 2, 16)
        pack_mixers(block)
        set_mixer_scales(block)
        scale = mixer.site_scale("x")
        found = torch.zeros(64)
        for cluster, channel in zip(mixer.clusters_of_channels().tolist(), range(64), strict=True):
            found[channel] = scale.flatten()[cluster] * 127
        if clusters == (1, 1):
            assert torch.allclose(scale.flatten() * 127, peaks.flatten(1).amax(1), rtol=1e-2)
        assert bool((found >= peaks.flatten() * 0.99).all())
        assert mixer.site_scale("B").shape == (2,) and mixer.site_scale("state").shape == (2, *clusters, 8)
        seen.append(mixer)

    config = Quamba2Config(head_clusters=clusters[0], channel_clusters=clusters[1])
    walk(uneven_mamba2(), check, batches(), config)
    assert len(seen) == 2


# 3
def test_more_clusters_never_round_more() -> None:
    """Squared error of x, whose scales are the largest of ever smaller sets."""
    errors: list[list[float]] = []

    def measure(block: Block) -> None:
        (name, mixer), *_ = mixers_of(block).items()
        peaks = channel_magnitudes(block, name, mixer, "max").view(2, 32).cpu()
        order = reorder_mixer(block, name, mixer, (2, 16), "max")
        x = torch.randn(100, 64, generator=torch.Generator().manual_seed(0)) * peaks.flatten()[order.channels] / 4
        own = x.abs().amax(0)
        nested = [own.max().expand(64), own.view(2, 32).amax(1).repeat_interleave(32)]
        nested += [own.view(4, 16).amax(1).repeat_interleave(16), own.view(16, 4).amax(1).repeat_interleave(4), own]
        errors.append([float((quantize_codes(x, s / 127) * (s / 127) - x).square().sum()) for s in nested])

    walk(uneven_mamba2(), measure, batches(), Quamba2Config(head_clusters=2, channel_clusters=16))
    for found in errors:
        assert found == sorted(found, reverse=True) and found[-1] < 0.5 * found[0]


# 4
def test_the_clusters_are_stored_and_end_where_they_must() -> None:
    mixer = mixer_of(quantized(uneven_mamba2()))
    spec = mixer.layer_spec.mixer
    assert (spec.head_clusters, spec.channel_clusters, spec.group_scales) == (2, 4, True), "two heads to a group"
    assert mixer.head_ends.tolist() == [[1, 2]] * 2 and bool((mixer.channel_ends[..., -1] == 16).all())
    assert mixer.sites() == {
        **dict.fromkeys(("z", "conv_x", "conv_B", "conv_C", "dt"), (1,)),
        **dict.fromkeys(("B", "C"), (2,)),
        "x": (2, 2, 4),
        "state": (2, 2, 4, 8),
    }


# 5
@torch.no_grad()
def test_what_is_large_on_some_text_is_large_on_other() -> None:
    """The order of channels by their magnitudes persists from sample to sample, in a trained model."""
    model = AutoModelForCausalLM.from_pretrained("tests/assets/mamba2-debian", dtype=torch.float32).eval()
    text = Path("tests/assets/debian-text/calibration.txt").read_bytes()[:40_000]
    ids = torch.tensor([byte % 4096 for byte in text[:1536]]).view(6, 256)
    found: list[list[Tensor]] = [[], []]
    for half in range(2):
        data = [{"input_ids": ids[half * 3 : half * 3 + 3]}]

        def look(block: Block, half: int = half) -> None:
            (name, mixer), *_ = mixers_of(block).items()
            found[half].append(channel_magnitudes(block, name, mixer, "mean_then_max").argsort().argsort().float())

        walk(copy.deepcopy(model), look, data, Quamba2Config())
    for first, second in zip(*found, strict=True):
        assert float(torch.corrcoef(torch.stack([first, second]))[0, 1]) > 0.9, "Spearman"


# 5
@torch.no_grad()
def test_clusters_of_some_text_are_mostly_those_of_other() -> None:
    """Of a trained model on two halves of a text, drawn at random: from cluster 0, of a head's small channels, to 3."""
    folder = Path("tests/assets/mamba2-debian")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    text = Path("tests/assets/debian-text/calibration.txt").read_text("utf-8")[:20_000]
    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids[0, : 32 * 64].view(32, 64)
    windows = torch.randperm(32, generator=torch.Generator().manual_seed(0)).view(2, 16)
    found: list[list[Tensor]] = [[], []]
    for half in range(2):

        def look(block: Block, half: int = half) -> None:
            (name, mixer), *_ = mixers_of(block).items()
            order = reorder_mixer(block, name, mixer, (4, 4), "max")
            clusters = channel_clusters(order.head_ends, order.channel_ends, mixer.geometry) % 4
            found[half].append(torch.empty_like(clusters).index_put_((order.channels,), clusters))

        walk(copy.deepcopy(model), look, [{"input_ids": ids[windows[half]]}], Quamba2Config())
    for first, second in zip(*found, strict=True):
        same, near, shuffled = (
            float(((first - other).abs() <= most).float().mean())
            for other, most in ((second, 0), (second, 1), (second.roll(7), 1))
        )
        assert same > 0.5 and near > 0.92 and shuffled < 0.8, (same, near, shuffled)


# 6
@pytest.mark.parametrize("values", [{}, W4A8, W4A16, {**W4A8, "weights": "nearest", "rotate": False}])
def test_reload_is_exact(values: dict[str, Any], tmp_path: Path) -> None:
    model = uneven_mamba2()
    model.tie_weights()
    quantized(model, **values)
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert fingerprint(reloaded) == fingerprint(model)
    assert torch.equal(logits_of(reloaded), logits_of(model))
    outputs = [m.generate(tokens(2, 6), max_new_tokens=6, do_sample=False) for m in (model, reloaded)]
    assert torch.equal(*outputs)


# 6
@pytest.mark.parametrize("values", [W4A8, W4A16])
def test_codes_multiply_as_their_values_do(values: dict[str, Any]) -> None:
    layer = mixer_of(quantized(uneven_mamba2(), **values)).in_proj
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    read = x
    if layer.layer_spec.activation is not None:
        read = quantize_codes(x, layer.input_scale()) * layer.input_scale()
    assert layer.layer_spec.weight.bits == 4
    assert relative(layer(x) - layer.bias, read @ layer.dequantized().t()) < 1e-5


@pytest.mark.parametrize(("values", "most"), [({}, 0.12), (W4A16, 0.3), (W4A8, 0.3)])
def test_the_function_survives(values: dict[str, Any], most: float) -> None:
    expected = logits_of(uneven_mamba2())
    assert relative(logits_of(quantized(uneven_mamba2(), **values)), expected) < most


def test_clusters_and_group_scales_help_where_channels_are_uneven() -> None:
    expected = logits_of(uneven_mamba2())
    error = {
        name: relative(logits_of(quantized(uneven_mamba2(), **values)), expected)
        for name, values in {
            "quamba2": {"head_clusters": 2, "channel_clusters": 4},
            "one": {"head_clusters": 1, "channel_clusters": 1, "group_scales": False},
        }.items()
    }
    quamba = QuambaConfig(any_generation=True, dataset=batches(), num_samples=8)
    error["quamba"] = relative(logits_of(hf_lowbit.quantize(uneven_mamba2(), quamba)), expected)
    assert error["quamba2"] < 0.8 * error["one"] and error["quamba2"] < 0.8 * error["quamba"]


def test_gptq_loses_less_than_rounding_to_nearest() -> None:
    expected = logits_of(uneven_mamba2())
    gptq, nearest = (
        relative(logits_of(quantized(uneven_mamba2(), **W4A16, weights=weights)), expected)
        for weights in (None, "nearest")
    )
    assert gptq < nearest


def test_bits_of_what_is_small() -> None:
    mixer = mixer_of(quantized(uneven_mamba2(), **W4A16))
    bits = {name: module.layer_spec.weight.bits for name, module in packed_modules(mixer).items()}
    assert bits == {"": 8, "in_proj": 4, "conv1d": 8, "out_proj": 4}
    assert mixer.out_proj.layer_spec.transform == Hadamard(64) and not mixer.sites()
    asked = quantized(uneven_mamba2(), **W4A16, overrides={"conv1d": {"bits": 4, "group_size": None}})
    assert mixer_of(asked).conv1d.layer_spec.weight.bits == 4


def test_single_blocks_with_inputs_in_full_precision() -> None:
    """W4AX."""
    model = quantized(uneven_mamba2(), **W4A8, overrides={"layers.1": {"activation_bits": None}})
    quantizing, floating = (packed_modules(mixer_of(model, layer)) for layer in range(2))
    assert quantizing[""].sites() and not floating[""].sites()
    assert all(module.layer_spec.activation is None for module in floating.values())
    assert quantizing["in_proj"].layer_spec.activation is not None
    assert {module.layer_spec.weight.bits for name, module in floating.items() if "_proj" in name} == {4}


def test_blocks_are_chosen_by_what_they_lose(tmp_path: Path) -> None:
    config = Quamba2Config(**W4A8, num_samples=8)
    found = hf_lowbit.search_blocks(uneven_mamba2(), config, batches(), count=1)
    model = hf_lowbit.quantize(uneven_mamba2(), found.config, batches())
    floating = [name for name, layer in model.backbone.layers.named_children() if not layer.mixer.sites()]
    assert [f"backbone.layers.{name}" for name in floating] == list(found.blocks)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path).eval()), logits_of(model))
