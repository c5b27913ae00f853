"""Quamba2: the numbered tests of its method page, and what becomes of a model."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BambaConfig, BambaForCausalLM

import hf_lowbit
from hf_lowbit.calibration import reordering
from hf_lowbit.calibration.block import Block
from hf_lowbit.calibration.mixers import mixers_of, pack_mixers, rotate_outputs
from hf_lowbit.calibration.reordering import channel_magnitudes, permute_mixer, reorder_mixer
from hf_lowbit.calibration.state_space import set_mixer_scales
from hf_lowbit.config import ConfigError
from hf_lowbit.kernels import quantize_codes
from hf_lowbit.nn import Hadamard, PackedLinear
from hf_lowbit.plan import PlanError, packed_modules
from hf_lowbit.transforms.reorder import ReorderError, Reordering
from hf_lowbit_quamba import QuambaConfig
from hf_lowbit_quamba2 import Quamba2Config
from tests.integrations.tiny_state_space import TINY, relative, step, tokens
from tests.matrix.models import fingerprint
from tests.plugins.outliers import walk

W4A8, W4A16 = {"bits": 4, "group_size": 16}, {"bits": 4, "group_size": 16, "activation_bits": None}
SECOND = [name for name, tiny in TINY.items() if tiny.generation == 2]


def batches(count: int = 4, length: int = 40) -> list[dict[str, Tensor]]:
    """Two sequences each."""
    return [{"input_ids": tokens(2, length, seed)} for seed in range(count)]


def uneven_mamba2() -> Any:
    """A few channels of x are far larger than the others, not the same ones in every head; the function is tame."""
    model = TINY["mamba2"].create()
    generator = torch.Generator().manual_seed(0)
    for layer in model.backbone.layers:
        mixer = layer.mixer
        for head in range(4):
            for channel in torch.randperm(16, generator=generator)[:3] + 16 * head:
                mixer.conv1d.weight.data[channel] *= 30
                mixer.out_proj.weight.data[:, channel] /= 30
    return model


def quantized(model: Any, **values: Any) -> Any:
    """In place, on :func:`batches`."""
    return hf_lowbit.quantize(model, Quamba2Config(**values, dataset=batches(), num_samples=8))


@torch.no_grad()
def logits_of(model: Any) -> Tensor:
    """For tokens that nothing was calibrated on."""
    logits: Tensor = model(tokens(2, 48, seed=9), use_cache=False).logits
    return logits


def notes_of(model: Any) -> list[str]:
    return hf_lowbit.report(model).warnings


def mixer_of(model: Any, layer: int = 0) -> Any:
    return model.backbone.layers[layer].mixer


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


@pytest.mark.parametrize("values", [{}, W4A8, W4A16])
def test_embedding_and_head(values: dict[str, Any], tmp_path: Path) -> None:
    """The rotation unties the head: each has codes of its own."""
    sizes = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48}
    heads = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 2, "mamba_d_state": 8}
    attention = {"num_attention_heads": 4, "num_key_value_heads": 2, "attn_layer_indices": [1]}
    torch.manual_seed(0)
    config = BambaConfig(**sizes, **heads, **attention, tie_word_embeddings=True, initializer_range=0.2)
    model = BambaForCausalLM(config).eval()
    model.model.final_layernorm.weight.data.uniform_(0.5, 1.5)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    expected = logits_of(model)
    quantized(model, **values, quantize_embeddings=True, quantize_lm_head=True)
    embedding, head = (packed_modules(model)[name] for name in ("model.embed_tokens", "lm_head"))
    bits = values.get("bits", 8)
    assert embedding.layer_spec.weight.bits == head.layer_spec.weight.bits == bits
    assert not torch.equal(embedding.weight, head.weight), "rotated, they differ"
    assert (head.input_scale() is not None) == ("activation_bits" not in values)
    assert relative(logits_of(model), expected) < (0.1 if bits == 8 else 0.5)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path).eval()), logits_of(model))


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_a_head_whose_type_the_model_reads(name: str) -> None:
    """transformers casts what Mamba's head reads to the type of its weight: codes there would be wrong answers."""
    model = TINY[name].create()
    quantized(model, quantize_embeddings=True, quantize_lm_head=True)
    assert "backbone.embeddings" in packed_modules(model) and type(model.lm_head) is nn.Linear
    assert "reads lm_head.weight itself" in hf_lowbit.report(model).skipped["lm_head"]


@pytest.mark.parametrize("values", [{}, W4A8, W4A16])
def test_mamba_has_no_clusters(values: dict[str, Any], tmp_path: Path) -> None:
    model = TINY["mamba"].create()
    expected = logits_of(model)
    quantized(model, **values)
    assert relative(logits_of(model), expected) < (0.1 if not values else 0.4)
    shapes = mixer_of(model).sites()
    if "state" in shapes:  # a scale per channel
        assert shapes.pop("state") == (mixer_of(model).geometry.intermediate,)
    assert ("x" in shapes) == (values != W4A16)
    assert all(shape == (1,) for shape in shapes.values())
    assert mixer_of(model).x_proj.layer_spec.weight.bits == values.get("bits", 8)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path).eval()), logits_of(model))
    with pytest.raises(PlanError, match="a mixer of Mamba, whose channels have no heads: leave head_clusters=2 out"):
        quantized(TINY["mamba"].create(), head_clusters=2)


@pytest.mark.parametrize("name", [name for name in SECOND if name != "mamba2"])
def test_hybrids(name: str) -> None:
    """Their mixers are reordered and quantized; the rest is left to another method.

    Random models amplify what 8 bits change: Granite's tokens find other experts.
    """
    model = TINY[name].create()
    expected = logits_of(model)
    quantized(model, head_clusters=2, channel_clusters=4, rotate=name == "bamba")
    assert relative(logits_of(model), expected) < 0.25
    mixers = [module for module in packed_modules(model).values() if getattr(module, "generation", 0) == 2]
    assert mixers and all(mixer.sites()["x"] == (2, 2, 4) for mixer in mixers)
    assert not any("attn" in name for name in packed_modules(model))


def test_kmeans_and_the_other_statistic() -> None:
    expected = logits_of(uneven_mamba2())
    for values in ({"statistic": "max"}, {"clustering": "kmeans", "channel_clusters": 2, "head_clusters": 2}):
        assert relative(logits_of(quantized(uneven_mamba2(), **values)), expected) < 0.12


def test_a_reordering_that_changes_the_function_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as one that a new version of the library would need more for."""

    def forgetful(mixer: Any, order: Reordering) -> None:
        kept = mixer.norm.weight.data
        permute_mixer(mixer, order)
        mixer.norm.weight.data = kept

    model = uneven_mamba2()
    before = fingerprint(model)
    monkeypatch.setattr(reordering, "permute_mixer", forgetful)
    with pytest.raises(ReorderError, match=r"layers.\d.mixer: the reordered mixer's output differs by"):
        quantized(model)
    assert fingerprint(model) == before and not packed_modules(model)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"head_clusters": 3, "channel_clusters": 4}, "head_clusters=3 exceeds the 2 heads of a state group"),
        ({"head_clusters": 2, "channel_clusters": 17}, "channel_clusters=17 exceeds the 16 channels of a head"),
        ({"bits": 4, "activation_bits": None, "overrides": {"layers.0": {"activation_bits": 8}}}, "stored scales"),
    ],
)
def test_plans_that_do_not_fit(values: dict[str, Any], message: str) -> None:
    model = TINY["mamba2"].create()
    before = fingerprint(model)
    with pytest.raises(PlanError, match=message):
        quantized(model, **values)
    assert fingerprint(model) == before


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bits": 3}, "bits must be 8 or 4, not 3"),
        ({"activation_bits": 4}, "inputs are symmetric integers of 8 bits with stored scales"),
        ({"activation_static": False}, "inputs are symmetric integers of 8 bits with stored scales"),
        ({"activation_symmetric": False}, "inputs are symmetric integers of 8 bits with stored scales"),
        ({"activation_bits": None, "head_clusters": 2}, "head_clusters=2 needs activation_bits=8"),
        ({"head_clusters": 0}, "head_clusters must be a positive integer or None, not 0"),
        ({"channel_clusters": 2.0}, "channel_clusters must be a positive integer or None, not 2.0"),
        ({"clustering": "ward"}, "clustering must be 'optimal' or 'kmeans', not 'ward'"),
        ({"statistic": "mean"}, "statistic must be 'mean_then_max' or 'max', not 'mean'"),
        ({"weights": "rtn"}, "weights must be None or 'gptq' or 'nearest', not 'rtn'"),
        ({"group_scales": 1}, "group_scales must be True or False, not 1"),
        ({"rotate": 1}, "rotate must be True or False, not 1"),
        ({"search_clip": 1}, "search_clip must be True or False, not 1"),
        ({"damping": 0}, "damping must lie above 0 and not above 10: 0"),
    ],
)
def test_refusals(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"Quamba2Config: {message}"):
        Quamba2Config(**values)


def test_defaults_of_groups_survive_storage() -> None:
    for values, group in (({}, None), ({"bits": 4}, 128), ({"bits": 4, "group_size": None}, None)):
        config = Quamba2Config(**values)
        assert config.group_size == group
        assert Quamba2Config.from_dict(config.to_dict()) == config
    assert replace(Quamba2Config(), bits=4).group_size is None, "a config that is changed keeps its groups"
