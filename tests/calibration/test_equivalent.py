"""OmniQuant's equivalent transformation: it leaves the function, its gradients arrive, and it is folded as trained."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call

from hf_lowbit.calibration.block import Block
from hf_lowbit.calibration.equivalent import EquivalentTransformation, shifts_exactly
from hf_lowbit.calibration.reconstruct import Training, _loss, _parameters, _quantized_inputs, reconstruct
from hf_lowbit.calibration.scaling import block_sites, smooth
from hf_lowbit.config import LowbitConfig
from hf_lowbit.rounding.learned import MovingClipping
from hf_lowbit_rtn import METHOD
from tests.calibration.gated import GatedModel
from tests.matrix.models import MODELS
from tests.plugins.outliers import outlier_llama, outputs_of, relative, walk

W4A4: LowbitConfig = METHOD.config_class(bits=4, group_size=None, symmetric=False, activation_bits=4)
FAMILIES = ["llama", "gpt2", "qwen3_moe", "whisper", "mamba"]


def perturbed(block: Block) -> EquivalentTransformation:
    """With scales and shifts that are far from where they begin."""
    transformation = EquivalentTransformation(block, block.magnitudes())
    generator = torch.Generator().manual_seed(0)
    for _, parameter in transformation.named_parameters():
        parameter.data += 0.5 * torch.randn(parameter.shape, generator=generator)
    return transformation


def clippings(block: Block, transformation: EquivalentTransformation) -> dict[str, MovingClipping]:
    return {
        key: MovingClipping(matrix.weight, matrix.spec, transformation.rewriting(matrix))
        for key, matrix in block.matrices.items()
    }


def mean_loss(
    block: Block, learned: dict[str, MovingClipping], transformation: EquivalentTransformation | None
) -> float:
    """Of one pass over the data."""
    with _quantized_inputs(block, through_scale=False):
        losses = [float(_loss(block, learned, transformation, batch)) for batch in range(len(block))]
    return sum(losses) / len(losses)


def with_biased_norms(model: nn.Module) -> nn.Module:
    """Random norms and biases, so that nothing is trivially one or zero."""
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def every_block(model: nn.Module, check: Any, batches: Any = None, config: LowbitConfig = W4A4) -> None:
    found = []

    def step(block: Block) -> None:
        found.append(check(block))

    walk(model, step, batches, config, targets=True)
    assert found


# 2
@pytest.mark.parametrize("name", FAMILIES)
def test_the_function_stays(name: str) -> None:
    tiny, sites, shifts = MODELS[name], [], []

    def check(block: Block) -> None:
        if not block.magnitudes():
            return
        before = outputs_of(block)
        transformation = perturbed(block)
        names = dict(transformation.named_parameters())
        sites.extend(name for name in names if name.startswith("scale"))
        shifts.extend(name for name in names if name.startswith("shift"))
        args, kwargs = block.arguments(0)
        simulated = block.output_of(functional_call(block.module, transformation.values(), args, kwargs))
        transformation.fold_()
        assert torch.equal(simulated, block.run(0)), "what is simulated is what is folded"
        assert relative(outputs_of(block), before) < 1e-5

    torch.manual_seed(0)
    every_block(with_biased_norms(tiny.build()), check, [tiny.inputs(torch.float32)] * 2)
    assert sites and bool(shifts) == (name in ("gpt2", "whisper"))


def test_it_begins_at_smooth_quants_scales() -> None:
    def check(block: Block) -> None:
        other = copy.deepcopy(block.module)
        EquivalentTransformation(block, block.magnitudes()).fold_()
        ours = {name: value.clone() for name, value in block.module.state_dict().items()}
        block.module.load_state_dict(other.state_dict())
        smooth(block, 0.5)
        for name in ("input_layernorm.weight", "post_attention_layernorm.weight"):
            torch.testing.assert_close(ours[name], block.module.get_parameter(name).data)
        for name in ("self_attn.q_proj.weight", "mlp.gate_proj.weight"):  # no site divides their rows
            torch.testing.assert_close(ours[name], block.module.get_parameter(name).data)

    every_block(outlier_llama(), check)


# 4
def test_gradients_reach_scales_and_shifts() -> None:
    """With quantized weights and inputs; without, the loss does not depend on them."""
    tiny = MODELS["gpt2"]

    def check(block: Block) -> None:
        transformation = EquivalentTransformation(block, block.magnitudes())
        with torch.enable_grad():
            learned = clippings(block, transformation)
            values = {name: value for name, value in transformation.values().items()}
            for key, weight in learned.items():
                matrix = block.matrices[key]
                values[key] = matrix.skeleton.from_matrix(matrix.parameter, weight())
            args, kwargs = block.arguments(0)
            output = block.output_of(functional_call(block.module, values, args, kwargs))
            (output - block.target(0)).square().mean().backward()
        for name, parameter in transformation.named_parameters():
            assert parameter.grad is not None and bool(torch.isfinite(parameter.grad).all()), name
            assert float(parameter.grad.abs().max()) > 0, name

    torch.manual_seed(0)
    every_block(with_biased_norms(tiny.build()), check, [tiny.inputs(torch.float32)] * 2)


# 3, 5
def test_training_lowers_the_loss_and_changes_nothing_until_it_is_folded() -> None:
    losses: list[tuple[float, float]] = []

    def check(block: Block) -> None:
        before = copy.deepcopy(block.module.state_dict())
        transformation = EquivalentTransformation(block, block.magnitudes(), lr_scale=0.4)
        start = [parameter.detach().clone() for _, parameter in transformation.named_parameters()]
        learned = clippings(block, transformation)
        first = mean_loss(block, learned, transformation)
        training = Training(iterations=40, learning_rate=0.05, optimizer="adam")
        reconstruct(block, learned, training, transformation)
        losses.append((first, mean_loss(block, learned, transformation)))
        ends = [parameter for _, parameter in transformation.named_parameters()]
        assert all(bool((old != new).any()) for old, new in zip(start, ends, strict=True))
        for name, value in block.module.state_dict().items():
            assert torch.equal(value, before[name])

    every_block(outlier_llama(), check)
    assert losses[0][1] < 0.95 * losses[0][0], "the first block's, whose inputs are exact"
    assert losses[1][1] < 1.02 * losses[1][0], "nine tenths of it came in with the inputs"


def test_what_was_trained_is_what_runs() -> None:
    """The packed block returns what the trained one did: its scales, norms, codes and quantized inputs."""

    def check(block: Block) -> None:
        transformation = EquivalentTransformation(block, block.magnitudes())
        learned = clippings(block, transformation)
        reconstruct(block, learned, Training(iterations=6, learning_rate=0.05, optimizer="adam"), transformation)
        with _quantized_inputs(block, through_scale=False):
            values = _parameters(block, learned)
            values = {**transformation.values(without=values), **values}
            args, kwargs = block.arguments(0)
            trained = block.output_of(functional_call(block.module, values, args, kwargs))
        packed = {key: weight.pack() for key, weight in learned.items()}
        transformation.fold_()
        for key, codes in packed.items():
            block.pack(key, codes)
        assert relative(block.run(0), trained) < 1e-5

    every_block(outlier_llama(), check)


def test_divided_norms_are_stored_as_they_are_in_bfloat16() -> None:
    tiny = MODELS["gpt2"]

    def check(block: Block) -> None:
        for parameter in block.module.parameters():
            parameter.data = parameter.data.bfloat16().float()
        transformation = perturbed(block)
        transformation.fold_()
        for site in transformation.sites:
            if site.kind == "norm":
                weight = block.module.get_parameter(f"{site.previous}.weight")
                torch.testing.assert_close(weight.bfloat16().float(), weight, rtol=1e-6, atol=0)
                bias = block.module.get_parameter(f"{site.previous}.bias")
                torch.testing.assert_close(bias.bfloat16().float(), bias, rtol=1e-5, atol=1e-6)

    torch.manual_seed(0)
    every_block(with_biased_norms(tiny.build()), check, [tiny.inputs(torch.float32)] * 2)


def test_what_a_gate_multiplies_is_not_shifted() -> None:
    """Its channels can be scaled, but a shift would be multiplied by the gate."""

    def check(block: Block) -> None:
        sites = block_sites(block)
        assert sites and not any(shifts_exactly(block, site) for site in sites)

    torch.manual_seed(0)
    every_block(GatedModel().eval(), check, [{"x": torch.randn(2, 7, 32)}])


def test_blocks_without_sites_have_nothing_to_learn() -> None:
    tiny, empty = MODELS["whisper"], []

    def check(block: Block) -> None:
        if len(block.matrices) == 1:
            transformation = EquivalentTransformation(block, block.magnitudes())
            assert transformation.parameter_groups() == [] and transformation.values() == {}
            empty.append(block.name)

    every_block(tiny.build().eval(), check, [tiny.inputs(torch.float32)])
    assert empty
