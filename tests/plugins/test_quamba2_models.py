"""quamba2: embeddings and heads, other models, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BambaConfig, BambaForCausalLM

from hf_lowbit.calibration import reordering
from hf_lowbit.calibration.reordering import permute_mixer
from hf_lowbit.config import ConfigError
from hf_lowbit.plan import PlanError, packed_modules
from hf_lowbit.transforms.reorder import ReorderError, Reordering
from hf_lowbit_quamba2 import Quamba2Config
from tests.integrations.tiny_state_space import TINY, relative
from tests.matrix.models import fingerprint
from tests.plugins.quamba2_models import (
    SECOND,
    W4A8,
    W4A16,
    logits_of,
    mixer_of,
    quantized,
    uneven_mamba2,
)


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
