"""The units of calibration: chains where there are any, else single blocks, and few single layers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel, UNet2DConditionModel
from torch import Tensor, nn

import hf_lowbit
from hf_lowbit.calibration.block import Block
from hf_lowbit.calibration.data import prepare_data
from hf_lowbit.calibration.units import Units, find_units, without_cache
from hf_lowbit.calibration.walk import Walk, Walked
from hf_lowbit.integrations.loading import model_facts
from hf_lowbit.plan import build_plan, packed_modules
from hf_lowbit.rounding import round_to_nearest
from hf_lowbit.tensorwise import pack_parameter
from tests.integrations.tiny_diffusers import _INPUTS, MODELS

ASSETS = Path(__file__).parents[1] / "assets"
CONFIG = hf_lowbit.RTNConfig(bits=4, group_size=None)


def units_of(model: nn.Module, batch: dict[str, Any]) -> Units:
    layers = build_plan(model, CONFIG, model_facts(model, ())).layers
    layers = {name: layer for name, layer in layers.items() if layer.kind != "embedding"}
    found = find_units(model.eval(), layers, [without_cache(model, batch)])
    held = [layer for unit in found.units for block in unit.stack.blocks for layer in layers if _within(layer, block)]
    assert sorted(held) == sorted(layers), "every layer is in one unit"
    return found


def _within(layer: str, block: str) -> bool:
    return layer == block or layer.startswith(f"{block}.")


def blocks_of(found: Units) -> list[str]:
    return [unit.stack.blocks[0] for unit in found.units if unit.stack.blocks[0] not in found.layer_by_layer]


def walk(model: nn.Module, batches: list[dict[str, Any]], step: Any, **options: Any) -> Walked:
    plan = build_plan(model, CONFIG, model_facts(model, ()))
    return Walk(model.eval(), plan.layers, step, batches, pack_parameter, **options).run()


def nearest(block: Block) -> None:
    for key, matrix in block.matrices.items():
        block.pack(key, round_to_nearest(matrix.weight, matrix.spec))


def test_a_unet_is_taken_apart_into_residual_and_transformer_blocks() -> None:
    """adaround.md's units: ResnetBlock2D and BasicTransformerBlock; single layers are those it names."""
    model = UNet2DConditionModel.from_pretrained(ASSETS / "sd-fashion/unet", torch_dtype=torch.float32)
    batch = {
        "sample": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([5, 5]),
        "encoder_hidden_states": torch.randn(2, 16, 96),
    }
    found = units_of(model, batch)
    kinds = {type(model.get_submodule(name)).__name__ for name in blocks_of(found)}
    assert kinds == {"ResnetBlock2D", "BasicTransformerBlock"} and len(blocks_of(found)) == 15
    assert {name.rpartition(".")[2] for name in found.layer_by_layer} == {
        "conv_in", "conv_out", "linear_1", "linear_2", "proj_in", "proj_out", "conv",
    }  # fmt: skip
    assert len(found.layer_by_layer) == 20 and not any(unit.is_chain for unit in found.units)


def test_a_dit_stays_one_chain() -> None:
    model = DiTTransformer2DModel.from_pretrained(ASSETS / "dit-fashion/transformer", torch_dtype=torch.float32)
    batch = {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([5, 5]),
        "class_labels": torch.tensor([0, 1]),
    }
    found = units_of(model, batch)
    assert [len(unit.stack.blocks) for unit in found.units if unit.is_chain] == [len(model.transformer_blocks)]
    assert found.layer_by_layer == ["pos_embed.proj", "proj_out_1", "proj_out_2"]


@pytest.mark.parametrize(
    ("name", "blocks"),
    [
        ("UNet2DModel", ["ResnetBlock2D", "Attention"]),
        ("SD3Transformer2DModel", ["JointTransformerBlock"]),
        ("FluxTransformer2DModel", ["FluxTransformerBlock", "FluxSingleTransformerBlock"]),
    ],
)
def test_blocks_of_two_streams_or_skips_are_units_of_their_own(name: str, blocks: list[str]) -> None:
    model = MODELS[name]()
    found = units_of(model, _INPUTS[name])
    assert {type(model.get_submodule(block)).__name__ for block in blocks_of(found)} == set(blocks)


@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "UNet2DConditionModel"])
def test_targets_and_inputs_are_the_models_own(name: str) -> None:
    """Of every unit: targets are what the float block returns, both streams of it; inputs what the packed ones give."""
    torch.manual_seed(0)
    model, batch = MODELS[name]().eval(), _INPUTS[name]
    outputs: dict[str, Tensor] = {}
    reference = copy.deepcopy(model)
    for block, module in list(reference.named_modules())[1:]:
        module.register_forward_hook(lambda m, args, output, block=block: outputs.update({block: _joined(output)}))
    with torch.no_grad():
        reference(**batch)
    seen: list[str] = []

    def step(block: Block) -> None:
        torch.testing.assert_close(block.target(0), outputs[block.name], rtol=1e-4, atol=1e-5)
        if block.name == seen[0] if seen else True:
            torch.testing.assert_close(block.run(0), outputs[block.name], rtol=1e-4, atol=1e-5)
        nearest(block)
        seen.append(block.name)

    walk(model, [batch], step, targets=True)
    expected = MODELS[name]()
    expected.load_state_dict(reference.state_dict())
    hf_lowbit.quantize(expected, CONFIG)
    with torch.no_grad():
        assert torch.equal(model(**batch)[0], expected(**batch)[0])
    assert len(seen) > 10 and set(packed_modules(model)) == set(packed_modules(expected))


def _joined(output: Any) -> Tensor:
    tensors = [output] if isinstance(output, Tensor) else [x for x in output if isinstance(x, Tensor)]
    if len(tensors) > 1 and all(x.dim() == 3 and x.shape[2] == tensors[0].shape[2] for x in tensors):
        return torch.cat(tensors, dim=1)
    return tensors[0] if tensors else torch.empty(0)


class Inner(nn.Module):
    def __init__(self, exponent: float = 1.0) -> None:
        super().__init__()
        self.up, self.down, self.exponent = nn.Linear(8, 16), nn.Linear(16, 8), exponent

    def forward(self, x: Tensor) -> Tensor:
        """Some block."""
        return x + self.exponent * self.down(self.up(x).relu())


class Looped(nn.Module):
    """Calls its blocks three times in turn, the sampler's steps within the model."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Inner() for _ in range(2))

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """``[samples, 8]``."""
        for _ in range(3):
            for block in self.blocks:
                sample = block(sample)
        return sample


def test_a_block_that_is_called_again_sees_all_of_its_calls() -> None:
    torch.manual_seed(0)
    model, batches = Looped(), [{"sample": torch.randn(4, 8), "timestep": torch.full((4,), t)} for t in (9, 3)]
    inputs: list[Tensor] = []
    handle = model.blocks[0].register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach().clone()))
    for batch in batches:
        model(**batch)
    handle.remove()
    lengths: dict[str, int] = {}

    def step(block: Block) -> None:
        lengths[block.name] = len(block)
        if block.name == "blocks.0":
            for index, expected in enumerate(inputs):
                torch.testing.assert_close(block.arguments(index)[0][0], expected)
            assert [int(block.timestep(index)[0]) for index in range(6)] == [9, 9, 9, 3, 3, 3]
        nearest(block)

    walk(model, batches, step, targets=True)
    assert lengths == {"blocks.0": 6, "blocks.1": 6}


class Overflowing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.blocks = nn.ModuleList((Inner(), Inner(float("inf")), Inner()))

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """Infinite at timestep 3, behind the second block."""
        sample = self.first(sample)
        for block in self.blocks:
            sample = block(sample) if block.exponent == 1 or timestep[0] == 3 else sample * 1
        return sample


def test_activations_that_are_not_finite_are_noted_by_layer_and_timestep(caplog: pytest.LogCaptureFixture) -> None:
    """Such a block is rounded to nearest; those before it are calibrated."""
    torch.manual_seed(0)
    model = Overflowing()
    batches = [{"sample": torch.randn(4, 8), "timestep": torch.full((4,), t)} for t in (3, 9)]
    model.blocks[1].exponent = 1.0
    model.blocks[1].down.bias.data[0] = float("inf")
    calibrated: list[str] = []

    def step(block: Block) -> None:
        calibrated.append(block.name)
        nearest(block)

    walked = walk(model, batches, step)
    assert calibrated == ["first", "blocks.0", "blocks.1"]
    why = "the quantized model's activations are not finite in batch 0 of the calibration data, at timestep 3"
    assert walked.notes == {f"blocks.2.{key}.weight": f"{why}: rounded to nearest" for key in ("up", "down")}
    assert f"blocks.2: {why}" in caplog.text


def test_a_denoisers_batch_may_hold_one_timestep_and_nested_tensors() -> None:
    """A number is that of every sample; positions belong to all samples; what is too much is cut off."""
    batch = {
        "sample": torch.randn(4, 8), "timestep": torch.tensor(7), "added": {"text": torch.randn(4, 3)},
        "ids": torch.zeros(5, 3),
    }  # fmt: skip

    class Model(nn.Module):
        def forward(self, sample: Tensor, timestep: Tensor, added: Any, ids: Tensor) -> Tensor:
            """Nothing."""
            return sample

    options = {"num_samples": 6, "sequence_length": 8, "seed": 0}
    data = prepare_data([batch, {**batch, "timestep": 3}], Model(), None, **options)
    assert [each["timestep"].tolist() for each in data.batches] == [[7] * 4, [3] * 2]
    assert [len(each["added"]["text"]) for each in data.batches] == [4, 2]
    assert [len(each["ids"]) for each in data.batches] == [5, 5] and data.tokens == 6
    with pytest.raises(ValueError, match="differ in the first dimension"):
        prepare_data([{**batch, "timestep": torch.tensor([3, 4])}], Model(), None, **options)
    with pytest.raises(ValueError, match=r"added\.text is a str"):
        prepare_data([{**batch, "added": {"text": "x"}}], Model(), None, **options)
