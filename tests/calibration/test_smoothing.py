"""SVDQuant's smoothing: samples of inputs, layers that share a scale, where it goes, what it changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hf_lowbit.calibration.smoothing as smoothing
from hf_lowbit import RTNConfig
from hf_lowbit.calibration.block import Block
from hf_lowbit.calibration.smoothing import InputSample, SharedInput, shared_inputs, smooth_input
from hf_lowbit.nn import Scaling
from tests.matrix.models import MODELS
from tests.plugins.outliers import outlier_llama, outputs_of, relative, tiny_moe, token_batches, walk

W4A4 = RTNConfig(group_size=32, activation_bits=4, activation_group_size=32)


def of_block(model: Any, step: Any, index: int = 0, config: RTNConfig = W4A4) -> Any:
    """What a step returns for one block of a model."""
    found = []
    walk(model, lambda block: found.append(step(block)), token_batches(), config)
    return found[index]


def names(groups: list[SharedInput]) -> list[list[str]]:
    return [[key.removesuffix(".weight").rpartition(".")[2] for key in group.keys] for group in groups]


def test_samples_are_spread_evenly_over_all_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smoothing, "_TOKENS", 16)
    sample = InputSample(1)
    for part in torch.arange(100.0).reshape(-1, 1).split([3, 50, 1, 40, 6]):
        sample.update(part)
    assert sample.sample.flatten().tolist() == list(range(0, 100, 8))
    assert (sample.tokens, sample.maximum.item()) == (100, 99)


def test_samples_of_several_processes_lie_beside_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smoothing, "_TOKENS", 4)
    monkeypatch.setattr(smoothing, "processes", lambda: 2)
    parts = []
    for number in range(2):
        monkeypatch.setattr(smoothing, "rank", lambda number=number: number)
        sample = InputSample(2)
        sample.update(torch.full((3, 2), number + 1.0))
        parts.append(sample.summed()[-1])
    assert (parts[0] + parts[1])[:, 0].tolist() == [1, 1, 1, 0, 2, 2, 2, 0]


def test_layers_of_one_input_are_together_and_each_has_its_site() -> None:
    groups = of_block(outlier_llama(), shared_inputs)
    assert names(groups) == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    assert [group.site.previous.rpartition(".")[2] for group in groups] == [
        "input_layernorm", "v_proj", "post_attention_layernorm", "up_proj"
    ]  # fmt: skip
    assert all(group.is_linear and group.inputs is not None for group in groups)


def test_experts_are_by_themselves() -> None:
    groups = of_block(tiny_moe(), shared_inputs)
    experts = [group for group in groups if not group.is_linear]
    assert len(experts) == 2 * 4 and all(len(group.keys) == 1 and group.site is None for group in experts)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_smoothing_changes_no_output_and_lowers_the_error(name: str) -> None:
    """Llama folds every scale; GPT-2 keeps those behind attention and activation in the layers."""

    def step(block: Block) -> Any:
        before, groups = outputs_of(block), shared_inputs(block)
        errors = []
        for group in groups:
            parts = smoothing.parts_of(block, group.keys)
            first = smoothing.absorb(parts, group.inputs).error
            smooth_input(block, group, 6, True)
            errors.append((first, smoothing.absorb(smoothing.parts_of(block, group.keys), group.inputs).error))
        kept = [k for k, m in block.matrices.items() if isinstance(m.layer_spec.transform, Scaling)]
        return relative(outputs_of(block), before), errors, kept

    torch.manual_seed(0)
    model = outlier_llama() if name == "llama" else MODELS[name].build().eval()
    if name == "gpt2":
        model.transformer.h[0].mlp.c_fc.bias.data[[3, 30]] = 30.0  # outliers behind the activation
    changed, errors, kept = of_block(model, step)
    assert changed < 1e-5
    assert all(after <= before * 1.01 for before, after in errors)
    first, last = errors[0], errors[-1]
    assert kept == ([] if name == "llama" else ["attn.c_proj.weight", "mlp.c_proj.weight"])
    assert min(first[1] / first[0], last[1] / last[0]) < 0.7


def test_a_kept_scale_is_a_transform_of_every_layer() -> None:
    def step(block: Block) -> Any:
        group = shared_inputs(block)[0]
        group.site = None
        before, inputs = outputs_of(block), group.inputs
        smooth_input(block, group, 4, True)
        layers = [block.matrices[key].skeleton for key in group.keys]
        scales = [layer.transform_tensors()["scale"] for layer in layers]
        assert all(torch.equal(scale, scales[0]) for scale in scales)
        torch.testing.assert_close(layers[0].transformed(inputs), group.inputs)
        for key in group.keys:  # the float layers compute as before; what will be packed is scaled
            matrix = block.matrices[key]
            right = inputs @ matrix.skeleton.weight.t()
            torch.testing.assert_close(group.inputs @ matrix.weight.t(), right, rtol=1e-4, atol=1e-4)
        return relative(outputs_of(block), before)

    assert of_block(outlier_llama(), step) == 0


def test_one_step_leaves_all_as_it_is() -> None:
    def step(block: Block) -> Any:
        before = {name: parameter.clone() for name, parameter in block.module.named_parameters()}
        for group in shared_inputs(block):
            smooth_input(block, group, 1, True)
        return all(torch.equal(before[name], p) for name, p in block.module.named_parameters())

    assert of_block(outlier_llama(), step)
