"""The walk finds, captures and replaces the blocks of models it knows nothing about."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import hf_lowbit
from hf_lowbit.calibration.block import Block
from hf_lowbit.calibration.sequence import call_groups
from hf_lowbit.calibration.stacks import find_stacks
from hf_lowbit.calibration.walk import Walk, Walked
from hf_lowbit.integrations.loading import model_facts
from hf_lowbit.plan import build_plan, packed_modules
from hf_lowbit.rounding import round_to_nearest
from hf_lowbit.state import shared_weights
from hf_lowbit.tensorwise import pack_parameter
from tests.matrix.models import MODELS, TinyModel

CONFIG = hf_lowbit.RTNConfig(bits=4, group_size=32)
LANGUAGE = ["llama", "llama_tied", "gpt2", "qwen3_moe", "mamba", "mamba2", "whisper"]


def nearest(block: Block) -> None:
    for key, matrix in block.matrices.items():
        block.pack(key, round_to_nearest(matrix.weight, matrix.spec))


def walk(model: nn.Module, batches: list[dict[str, Any]], step: Any = nearest, **options: Any) -> Walked:
    plan = build_plan(model, CONFIG, model_facts(model, shared_weights(model)))
    return Walk(model, plan.layers, step, batches, pack_parameter, **options).run()


def tiny_and_batches(name: str) -> tuple[TinyModel, nn.Module, list[dict[str, Any]]]:
    torch.manual_seed(0)
    tiny = MODELS[name]
    return tiny, tiny.build().eval(), [tiny.inputs(torch.float32)] * 2


@pytest.mark.parametrize("name", MODELS)
def test_a_walk_that_rounds_to_nearest_is_rtn(name: str) -> None:
    """Every planned layer is reached, once, and the model computes what tensor-wise quantization makes of it."""
    tiny, model, batches = tiny_and_batches(name)
    expected = copy.deepcopy(model)
    walk(model, batches, targets=True)
    hf_lowbit.quantize(expected, CONFIG)
    assert set(packed_modules(model)) == set(packed_modules(expected))
    assert torch.equal(tiny.run(model), tiny.run(expected))


@pytest.mark.parametrize("name", LANGUAGE)
def test_blocks_are_chained_not_listed_one_by_one(name: str) -> None:
    _, model, batches = tiny_and_batches(name)
    outside = walk(model, batches).layer_by_layer
    assert outside == (["model.encoder.conv1", "model.encoder.conv2"] if name == "whisper" else [])


@pytest.mark.parametrize("name", MODELS)
def test_blocks_read_what_the_quantized_model_feeds_them(name: str) -> None:
    """Statistics equal those of hooks on a whole forward in which all earlier blocks are quantized already."""
    tiny, model, batches = tiny_and_batches(name)
    sums: dict[str, float] = {}

    def step(block: Block) -> None:
        for key, statistic in block.magnitudes().items():
            layer = block.matrices[key].layer
            if block.matrices[key].skeleton.kind == "linear":
                full = ".".join(part for part in (block.name, layer) if part)
                expected = _mean_input(model, full, tiny)
                torch.testing.assert_close(statistic.mean, expected, rtol=1e-4, atol=1e-6)
                sums[full] = float(statistic.mean.sum())
        nearest(block)

    walk(model, batches, step)
    assert sums or name == "gpt2"


def _mean_input(model: nn.Module, name: str, tiny: TinyModel) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    tiny.run(model)
    handle.remove()
    return seen[0].reshape(-1, seen[0].shape[-1]).abs().mean(0)


@pytest.mark.parametrize("name", LANGUAGE)
def test_targets_are_what_the_float_blocks_return(name: str) -> None:
    _, model, batches = tiny_and_batches(name)
    reference = copy.deepcopy(model)
    outputs: dict[str, torch.Tensor] = {}
    for block in [block for stack in find_stacks(model, _layers(model)) for block in stack.blocks]:
        module = reference.get_submodule(block)
        module.register_forward_hook(partial(_remember, outputs, block))
    with torch.no_grad():
        reference(**batches[0])
    compared = []

    def step(block: Block) -> None:
        if block.name in outputs:
            torch.testing.assert_close(block.target(0), outputs[block.name], rtol=1e-4, atol=1e-5)
            compared.append(block.name)
        nearest(block)

    walk(model, batches, step, targets=True)
    assert len(compared) == (4 if name == "whisper" else 2)


def _remember(outputs: dict[str, torch.Tensor], block: str, module: nn.Module, args: Any, output: Any) -> None:
    outputs[block] = output[0] if isinstance(output, tuple) else output


def _layers(model: nn.Module) -> list[str]:
    return list(build_plan(model, CONFIG, model_facts(model, shared_weights(model))).layers)


def test_layers_that_read_one_tensor_share_a_statistic() -> None:
    _, model, batches = tiny_and_batches("llama")

    def step(block: Block) -> None:
        hessians = block.hessians()
        names = ("q_proj", "k_proj", "v_proj")
        assert len({id(hessians[f"self_attn.{name}.weight"]) for name in names}) == 1
        assert hessians["mlp.gate_proj.weight"] is hessians["mlp.up_proj.weight"]
        assert len({id(hessian) for hessian in hessians.values()}) == 4
        groups = call_groups(block)
        assert [len(group) for group in groups] == [3, 1, 2, 1]
        assert sorted(key for group in groups for key in group) == sorted(block.matrices)
        nearest(block)

    walk(model, batches, step)


def test_experts_see_the_tokens_routed_to_them() -> None:
    _, model, batches = tiny_and_batches("qwen3_moe")

    def step(block: Block) -> None:
        hessians = block.hessians()
        routed = [h.tokens for key, h in hessians.items() if "gate_up_proj[" in key]
        assert sum(routed) == 2 * hessians["self_attn.q_proj.weight"].tokens, "two experts per token"
        nearest(block)

    walk(model, batches, step)


class Parallel(nn.Module):
    """A block of no library: attention and MLP side by side, called with keywords, returning a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(64), nn.Linear(64, 64)
        self.up, self.down = nn.Linear(64, 96), nn.Linear(96, 64)

    def forward(self, *, hidden: torch.Tensor, shift: torch.Tensor) -> tuple[None, torch.Tensor]:
        x = self.norm(hidden)
        return None, hidden + self.mix(x) * shift + self.down(F.relu(self.up(x)))


class Unseen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.layers = nn.ModuleList(Parallel() for _ in range(3))
        self.last = nn.Linear(64, 8)
        self.never = nn.Linear(64, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        for index, layer in enumerate(self.layers):
            _, h = layer(hidden=h, shift=torch.full((), 1.0 + index))
        return self.last(h)


def test_a_class_it_has_never_seen() -> None:
    torch.manual_seed(0)
    model, x = Unseen().eval(), torch.randn(3, 5, 64)
    expected = hf_lowbit.quantize(copy.deepcopy(model), CONFIG)
    names: list[str] = []
    shifts: list[float] = []

    def step(block: Block) -> None:
        names.append(block.name)
        if block.name.startswith("layers"):
            shifts.append(float(block.arguments(0)[1]["shift"]))
        nearest(block)

    walked = walk(model, [{"x": x}], step)
    assert names == ["first", "layers.0", "layers.1", "layers.2", "last"]
    assert shifts == [1.0, 2.0, 3.0], "every block keeps arguments of its own"
    assert walked.layer_by_layer == ["first", "last"]
    assert "not called" in walked.notes["never.weight"]
    assert torch.equal(model(x), expected(x))


class Skipping(nn.Module):
    """Blocks whose inputs are not each other's outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(32, 32), nn.ReLU()) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def test_what_is_no_chain_is_calibrated_layer_by_layer() -> None:
    torch.manual_seed(0)
    model, x = Skipping().eval(), torch.randn(4, 32)
    expected = hf_lowbit.quantize(copy.deepcopy(model), CONFIG)
    walked = walk(model, [{"x": x}])
    assert walked.layer_by_layer == ["layers.0.0", "layers.1.0", "layers.2.0"]
    assert torch.equal(model(x), expected(x))


def test_a_matrix_the_method_leaves_is_rounded_and_noted() -> None:
    _, model, batches = tiny_and_batches("llama")
    walked = walk(model, batches, lambda block: None)
    assert len(walked.notes) == 14 and "nearest" in walked.notes["model.layers.0.mlp.up_proj.weight"]


def test_floats_keep_their_type() -> None:
    _, model, batches = tiny_and_batches("llama")
    model = model.bfloat16()
    walk(model, batches)
    assert {p.dtype for p in model.parameters() if p.is_floating_point()} == {torch.bfloat16}
    assert packed_modules(model)["model.layers.0.mlp.up_proj"].is_packed()


def test_activations_beyond_the_limit_go_to_disk_and_change_nothing(tmp_path: Any) -> None:
    tiny, model, batches = tiny_and_batches("llama")
    other = copy.deepcopy(model)
    walk(model, batches, targets=True)
    walk(other, batches, targets=True, limit=0, folder=tmp_path)
    assert torch.equal(tiny.run(model), tiny.run(other))
    assert not list(tmp_path.iterdir()), "the spilled activations are gone"
