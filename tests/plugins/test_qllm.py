"""QLLM on a tiny Llama whose layers read outlier channels."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import hf_lowbit
from hf_lowbit.calibration.block import Block
from hf_lowbit.calibration.correction import Correction, CorrectionPlan, correct, rounded
from hf_lowbit.calibration.inspected import OutputError, captured_calls, common_owner
from hf_lowbit.calibration.reassembling import (
    Similarity,
    as_deployed,
    linear_layers,
    quantized_inputs,
    reassembly_sites,
    search_reassembly,
)
from hf_lowbit.config import ConfigError
from hf_lowbit.formats import WeightSpec, decode
from hf_lowbit.nn import Reassembly
from hf_lowbit.plan import packed_modules
from hf_lowbit.rounding import round_to_nearest
from hf_lowbit_qllm.recipe import correction_plan, make_recipe, reassemble
from tests.matrix.models import MODELS, fingerprint
from tests.plugins.outliers import logit_error, outlier_llama, outputs_of, quantized, relative, token_batches, walk

QLLMConfig = hf_lowbit.QLLMConfig


def first_block_only(step: Any) -> Any:
    """A step that looks at the first block; the others are rounded to nearest."""

    def once(block: Block) -> None:
        if block.name.endswith("layers.0"):
            step(block)

    return once


def wide_llama() -> LlamaForCausalLM:
    """One channel of every norm of a block is fifty times as large, and read with weights as much smaller."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes)).eval()
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        readers = [attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj]
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight.data[7] = 50.0
        for reader in readers:
            reader.weight.data[:, 7] /= 50
    return model


def on_the_first_block(step: Any, config: Any = None, model: nn.Module | None = None, **options: Any) -> None:
    walk(model or outlier_llama(), first_block_only(step), config=config or QLLMConfig(), **options)


def search(block: Block, ratio: float = 0.2, most: int = 32) -> dict[tuple[str, ...], Tensor]:
    """The squared errors of every trial at every site of a block."""
    statistics = block.collect(Similarity)
    return {
        site: search_reassembly(block, site, statistics[f"{site[0]}.weight"], ratio, most)
        for site in reassembly_sites(block)
    }


def test_the_sites_are_the_papers() -> None:
    """Everything but what reads attention's output; layers of one input together."""
    found: list[Any] = []
    on_the_first_block(lambda block: found.extend(reassembly_sites(block)))
    names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")
    assert found == [*names, ("mlp.down_proj",)]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gpt2", {"attn.c_attn", "mlp.c_fc", "mlp.c_proj"}),
        ("qwen3_moe", {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"}),
        ("mamba2", {"mixer.in_proj"}),
    ],
)
def test_the_sites_of_other_architectures(name: str, expected: set[str]) -> None:
    torch.manual_seed(0)
    found: list[set[str]] = []
    batches = [MODELS[name].inputs(torch.float32)] * 2
    step = lambda block: found.append({layer for site in reassembly_sites(block) for layer in site})  # noqa: E731
    walk(MODELS[name].build().eval(), step, batches, QLLMConfig())
    assert found[0] == expected


def test_layers_with_float_inputs_are_no_sites() -> None:
    found: list[Any] = []
    config = QLLMConfig(overrides={"k_proj": {"activation_bits": None}, "mlp": {"activation_bits": None}})
    on_the_first_block(lambda block: found.extend(reassembly_sites(block)), config)
    assert found == [("self_attn.q_proj", "self_attn.v_proj")]


def test_reassembly_preserves_the_block() -> None:
    """Without any rounding: exactly where only identical channels are merged."""

    def step(block: Block) -> None:
        before = outputs_of(block)
        search(block)
        layers = linear_layers(block)
        assert isinstance(layers["mlp.gate_proj"].layer_spec.transform, Reassembly)
        with rewritten(block):
            assert relative(outputs_of(block), before) < 1e-5
        assert torch.equal(outputs_of(block), before)

    model = wide_llama()
    for layer in model.model.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight.data[8:] = norm.weight.data[8::2].repeat_interleave(2)
        for writer in (layer.self_attn.o_proj, layer.mlp.down_proj):
            writer.weight.data[8:] = writer.weight.data[8::2].repeat_interleave(2, 0)
    embedding = model.model.embed_tokens.weight.data  # channels beyond the outlier come in equal pairs
    embedding[:, 8:] = embedding[:, 8::2].repeat_interleave(2, 1)
    on_the_first_block(step, model=model)


@contextmanager
def rewritten(block: Block) -> Iterator[None]:
    """The float layers compute with their rewritten weights on transformed inputs, nothing quantized."""
    layers = linear_layers(block)
    originals = {name: layer.weight.data for name, layer in layers.items()}
    hooks = []
    for name, layer in layers.items():
        layer.weight.data = layer.to_matrix("weight", layer.weight.data)
        read = lambda m, args, layer=layer: (layer.transformed(args[0]),)  # noqa: E731
        hooks.append(block.module.get_submodule(name).register_forward_pre_hook(read))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for name, layer in layers.items():
            layer.weight.data = originals[name]


def test_the_error_of_quantized_layers_falls_by_more_than_half() -> None:
    """W4A4 with an outlier of fifty times the other channels; no split is among the trials."""
    trials: dict[tuple[str, ...], Tensor] = {}
    on_the_first_block(lambda block: trials.update(search(block)), model=wide_llama())
    assert all(float(errors.min()) <= float(errors[0]) for errors in trials.values())
    for site in list(trials)[:2]:  # behind the norms that make the outliers
        assert float(trials[site].min()) < float(trials[site][0]) / 2, site


def test_the_searched_error_is_the_packed_layers() -> None:
    """Of the module the search looked at, once its layers are packed."""

    def step(block: Block) -> None:
        site = reassembly_sites(block)[0]
        owner = common_owner(block.module, site)
        measured = OutputError(block.module.get_submodule(owner), captured_calls(block, block.module.self_attn, 4), 1)
        searched = float(search(block)[site].min())
        for name in site:
            matrix = block.matrices[f"{name}.weight"]
            block.pack(matrix.key, round_to_nearest(matrix.weight, matrix.spec))
        measured.measure(0)
        assert float(measured.errors[0]) == pytest.approx(searched, rel=1e-3)

    on_the_first_block(step)


def test_layers_of_one_site_share_their_assignment() -> None:
    model = quantized(outlier_llama(), QLLMConfig(epochs=0))
    for layer in model.model.layers:
        attention = layer.self_attn
        assert isinstance(attention.q_proj.layer_spec.transform, Reassembly)
        for other in (attention.k_proj, attention.v_proj):
            assert other.layer_spec.transform == attention.q_proj.layer_spec.transform
            for part, tensor in attention.q_proj.transform_tensors().items():
                assert torch.equal(tensor, other.transform_tensors()[part])
        assert attention.o_proj.layer_spec.transform is None


def test_no_search_and_no_training_is_rounding_to_nearest() -> None:
    plain = quantized(outlier_llama(), QLLMConfig(channel_ratio=0, epochs=0))
    nearest = hf_lowbit.quantize(outlier_llama(), hf_lowbit.RTNConfig(bits=4, symmetric=False, activation_bits=4))
    assert fingerprint(plain) == fingerprint(nearest)


def test_a_correction_of_zero_is_the_plain_quantized_block() -> None:
    """B = 0 at first: the student computes what the packed layers do."""

    def step(block: Block) -> None:
        config = QLLMConfig()
        reassemble(block, config)
        layers = linear_layers(block)
        correction = Correction(block, layers, correction_plan(config))
        assert all(not b.any() for b in correction.b) and all(a.any() for a in correction.a)
        with quantized_inputs(block, layers):
            args, kwargs = block.arguments(0)
            student = torch.func.functional_call(block.module, correction.simulated(), args, kwargs)
        with as_deployed(block, layers):
            deployed = block.run(0)
        torch.testing.assert_close(block.output_of(student), deployed, rtol=1e-4, atol=1e-4)
        for key, matrix in block.matrices.items():
            block.pack(key, round_to_nearest(matrix.weight, matrix.spec))
        torch.testing.assert_close(block.run(0), deployed, rtol=1e-3, atol=1e-3)

    on_the_first_block(step)


def test_what_is_trained_is_what_is_deployed() -> None:
    """The loss after training is that of the packed block, and lower than before."""

    def step(block: Block) -> None:
        config = QLLMConfig(epochs=5, learning_rate=2e-3)
        reassemble(block, config)
        before, after = correct(block, linear_layers(block), correction_plan(config))
        for key, matrix in block.matrices.items():
            block.pack(key, round_to_nearest(matrix.weight, matrix.spec))
        losses = [(block.run(batch) - block.target(batch)).square().mean() for batch in range(len(block))]
        deployed = float(torch.stack(losses).mean())
        assert after < 0.9 * before
        assert deployed == pytest.approx(after, rel=0.02)

    on_the_first_block(step, targets=True)


def test_a_correction_that_does_not_help_is_left_out() -> None:
    def step(block: Block) -> None:
        values = {name: tensor.clone() for name, tensor in block.module.state_dict().items()}
        before, after = correct(
            block, linear_layers(block), CorrectionPlan(epochs=1, learning_rate=10.0, train_norms=True)
        )
        assert before == after
        assert all(torch.equal(tensor, values[name]) for name, tensor in block.module.state_dict().items())

    on_the_first_block(step, targets=True)


@pytest.mark.parametrize("train_norms", [True, False])
def test_norms_are_trained_on_demand(train_norms: bool) -> None:
    def step(block: Block) -> None:
        norm = block.module.input_layernorm.weight
        before = norm.detach().clone()
        correct(block, linear_layers(block), CorrectionPlan(epochs=3, learning_rate=2e-3, train_norms=train_norms))
        assert torch.equal(norm, before) is not train_norms
        assert all(parameter.grad is None for parameter in block.module.parameters())

    on_the_first_block(step, targets=True)


def test_every_part_lowers_the_models_error() -> None:
    """Rounding to nearest, then reassembly, then the correction, on tokens nothing was calibrated on."""
    reference = wide_llama()
    errors = [
        logit_error(quantized(wide_llama(), QLLMConfig(**values)), reference)
        for values in (
            {"channel_ratio": 0, "epochs": 0},
            {"epochs": 0},
            {"epochs": 5, "learning_rate": 2e-3},
        )
    ]
    assert errors[1] < 0.5 * errors[0]
    assert errors[2] < errors[1]


@pytest.mark.parametrize(
    "spec",
    [
        WeightSpec(bits=4, symmetric=False),
        WeightSpec(bits=3, group_size=16),
        WeightSpec(bits=4, group_size="tensor"),
        WeightSpec("nf", 4, group_size=32),
    ],
    ids=lambda spec: spec.json,
)
def test_simulated_rounding_is_packed_rounding(spec: WeightSpec) -> None:
    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(rounded(weight, spec), decode(round_to_nearest(weight, spec)), rtol=1e-6, atol=1e-7)


def test_saves_and_reloads_bit_equal(tmp_path: Path) -> None:
    model = quantized(outlier_llama(), QLLMConfig(epochs=1))
    batch = token_batches()[0]
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    reloaded = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert fingerprint(reloaded) == fingerprint(model)
    with torch.no_grad():
        assert torch.equal(reloaded(**batch).logits, model(**batch).logits)
    assert hf_lowbit.report(reloaded).packed_bytes == hf_lowbit.report(model).packed_bytes


@torch.no_grad()
def test_the_dequantized_model_is_the_packed_one_with_float_inputs() -> None:
    """Transforms fold back exactly; what remains is that inputs are not quantized any more."""
    model = quantized(outlier_llama(), QLLMConfig(epochs=1))
    folded = copy.deepcopy(model)
    for module in packed_modules(model).values():
        module.layer_spec = type(module.layer_spec)(module.layer_spec.weight, None, 0, module.layer_spec.transform)
    batch = token_batches()[0]
    expected = model(**batch).logits
    folded.dequantize()
    assert not packed_modules(folded)
    torch.testing.assert_close(folded(**batch).logits, expected, rtol=1e-3, atol=1e-3)


def test_two_runs_give_the_same_bits() -> None:
    one, other = (quantized(outlier_llama(), QLLMConfig(epochs=2)) for _ in range(2))
    assert fingerprint(one) == fingerprint(other)


def test_weights_alone_are_corrected_and_not_reassembled() -> None:
    config = QLLMConfig(activation_bits=None, epochs=5, learning_rate=2e-3)
    model = quantized(outlier_llama(), config)
    specs = [module.layer_spec for module in packed_modules(model).values()]
    assert all(spec.transform is None and spec.activation is None for spec in specs)
    plain = quantized(outlier_llama(), QLLMConfig(activation_bits=None, epochs=0))
    reference = outlier_llama()
    assert logit_error(model, reference) < logit_error(plain, reference)


@pytest.mark.parametrize(("bits", "activation_bits"), [(6, 6), (4, 8)])
def test_the_papers_other_widths(bits: int, activation_bits: int) -> None:
    model = quantized(outlier_llama(), QLLMConfig(bits=bits, activation_bits=activation_bits, epochs=0))
    assert logit_error(model, outlier_llama()) < 0.1


def test_targets_are_kept_only_where_something_is_trained() -> None:
    assert make_recipe(QLLMConfig()).targets and not make_recipe(QLLMConfig(epochs=0)).targets


def test_config_round_trips() -> None:
    config = QLLMConfig(bits=6, activation_bits=6, channel_ratio=0.1, epochs=2, learning_rate=1e-4, train_norms=False)
    assert QLLMConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    default = QLLMConfig()
    assert (default.bits, default.activation_bits, default.group_size, default.symmetric) == (4, 4, None, False)
    assert QLLMConfig.from_dict(default.to_dict()) == default


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"channel_ratio": 1.5}, "channel_ratio must lie between 0 and 1"),
        ({"channel_ratio": True}, "channel_ratio must lie between 0 and 1"),
        ({"search_steps": 0}, "search_steps must be an integer of at least 1"),
        ({"lora_rank": 0}, "lora_rank must be an integer of at least 1"),
        ({"epochs": -1}, "epochs must be an integer of at least 0"),
        ({"epochs": 1.5}, "epochs must be an integer of at least 0"),
        ({"learning_rate": 0}, "learning_rate must be a positive number"),
        ({"lora_alpha": "1"}, "lora_alpha must be a positive number"),
        ({"train_norms": 1}, "train_norms must be True or False"),
        ({"low_rank": {"rank": 4, "keep": "adapter"}}, 'keep="branch"'),
    ],
)
def test_bad_fields_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        QLLMConfig(**values)
