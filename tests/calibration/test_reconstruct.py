"""Block-wise reconstruction: what is trained, what is not, and what it is trained for."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hf_lowbit
from hf_lowbit.calibration import autocast
from hf_lowbit.calibration.block import Block
from hf_lowbit.calibration.reconstruct import Training, reconstruct
from hf_lowbit.kernels.activation import quantize_tokens
from hf_lowbit.rounding.learned import LearnedClipping, SignRounding
from tests.matrix.models import MODELS
from tests.plugins.outliers import outlier_llama, relative, tiny_moe, token_batches, walk

W3 = hf_lowbit.RTNConfig(bits=3, group_size=32, symmetric=False)
ADAM = Training(iterations=60, learning_rate=0.1, optimizer="adam")


def clippings(block: Block, keys: Any = None) -> dict[str, LearnedClipping]:
    chosen = block.matrices if keys is None else keys
    return {key: LearnedClipping(block.matrices[key].weight, block.matrices[key].spec) for key in chosen}


def in_first_block(
    check: Any, model: nn.Module | None = None, config: Any = W3, batches: Any = None, **options: Any
) -> None:
    """Run a check on the first block, with the float model's outputs at hand."""
    done = []

    def step(block: Block) -> None:
        if not done:
            check(block)
        done.append(block.name)

    walk(outlier_llama() if model is None else model, step, batches, config, targets=True, **options)
    assert len(done) > 1


def loss_of(block: Block, learned: dict[str, LearnedClipping]) -> float:
    """Mean squared error of the block with the weights that would be packed, apart from what is tested."""
    module = copy.deepcopy(block.module)
    for key, weight in learned.items():
        module.get_parameter(key).data = weight.hard()
    losses = []
    for batch in range(len(block)):
        args, kwargs = block.arguments(batch)
        losses.append(float((block.output_of(module(*args, **kwargs)) - block.target(batch)).square().mean()))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("keep_best", [True, False])
def test_the_block_comes_closer_to_what_the_float_one_returns(keep_best: bool) -> None:
    def check(block: Block) -> None:
        learned = clippings(block)
        before = loss_of(block, learned)
        first, last = reconstruct(block, learned, replace(ADAM, keep_best=keep_best))
        assert last < 0.7 * first
        assert loss_of(block, learned) < 0.7 * before

    in_first_block(check)


def test_products_in_bfloat16_train_nearly_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autocast, "has_bfloat16_units", lambda device: True)
    losses = []

    def check(block: Block) -> None:
        learned = clippings(block)
        before = loss_of(block, learned)
        reconstruct(block, learned, ADAM)
        assert all(p.dtype == torch.float32 for weight in learned.values() for p in weight.parameters())
        losses.append(loss_of(block, learned))
        assert losses[-1] < before

    for mixed in (False, True):
        in_first_block(check, mixed_precision=mixed)
    assert losses[0] != losses[1]
    assert losses[1] < 1.1 * losses[0]


def test_signs_of_gradients_train_as_well() -> None:
    def check(block: Block) -> None:
        learned = {k: SignRounding(m.weight, m.spec) for k, m in block.matrices.items()}
        before = loss_of(block, learned)
        reconstruct(block, learned, Training(iterations=60, learning_rate=1 / 60))
        assert loss_of(block, learned) < 0.9 * before

    in_first_block(check)


def test_nothing_of_the_block_changes() -> None:
    """Neither weights, nor what asks for gradients, nor hooks, nor gradients left behind."""

    def check(block: Block) -> None:
        block.module.mlp.down_proj.weight.requires_grad_(False)
        before = copy.deepcopy(block.module.state_dict())
        asked = {name: p.requires_grad for name, p in block.module.named_parameters()}
        assert set(asked.values()) == {True, False}
        reconstruct(block, clippings(block), replace(ADAM, iterations=3))
        for name, value in block.module.state_dict().items():
            assert torch.equal(value, before[name])
        assert asked == {name: p.requires_grad for name, p in block.module.named_parameters()}
        assert all(p.grad is None for p in block.module.parameters())
        assert not any(module._forward_pre_hooks for module in block.module.modules())

    in_first_block(check, config=hf_lowbit.RTNConfig(bits=4, group_size=32, activation_bits=8))


def test_a_failure_leaves_the_block_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def check(block: Block) -> None:
        def fail(batch: int) -> Tensor:
            raise OSError("the store is gone")

        monkeypatch.setattr(block, "target", fail)
        with pytest.raises(OSError, match="gone"):
            reconstruct(block, clippings(block), ADAM)
        assert all(p.requires_grad for p in block.module.parameters())
        assert not any(module._forward_pre_hooks for module in block.module.modules())

    in_first_block(check, config=hf_lowbit.RTNConfig(bits=4, group_size=32, activation_bits=8))


def test_no_iterations_leave_the_start() -> None:
    def check(block: Block) -> None:
        learned = clippings(block)
        assert reconstruct(block, learned, replace(ADAM, iterations=0)) == (0.0, 0.0)
        assert all(bool((weight.upper == 4.0).all()) for weight in learned.values())

    in_first_block(check)


def test_some_matrices_alone_can_be_trained() -> None:
    """The others compute as floats."""

    def check(block: Block) -> None:
        learned = clippings(block, ["mlp.down_proj.weight"])
        before = loss_of(block, learned)
        reconstruct(block, learned, ADAM)
        assert loss_of(block, learned) < 0.8 * before

    in_first_block(check)


def test_the_seed_decides_the_order_of_batches() -> None:
    ends: list[Tensor] = []

    def check(block: Block) -> None:
        for seed in (0, 0, 1):
            block.seed = seed
            learned = clippings(block)
            reconstruct(block, learned, Training(iterations=3, learning_rate=0.1, optimizer="adam", keep_best=False))
            ends.append(learned["mlp.down_proj.weight"].upper.detach().clone())

    in_first_block(check)
    assert torch.equal(ends[0], ends[1]) and not torch.equal(ends[0], ends[2])


def test_every_batch_is_seen_once_before_any_is_seen_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def check(block: Block) -> None:
        seen: list[int] = []
        target = block.target
        monkeypatch.setattr(block, "target", lambda batch: (seen.append(batch), target(batch))[1])
        reconstruct(block, clippings(block), replace(ADAM, iterations=8))
        assert sorted(seen[:4]) == sorted(seen[4:]) == [0, 1, 2, 3]

    in_first_block(check)


@pytest.mark.parametrize("batches", [1, 4])
def test_the_best_parameters_are_kept(batches: int) -> None:
    """With a rate that ruins the ranges at once, the start was best."""

    def check(block: Block) -> None:
        learned, wild = clippings(block), replace(ADAM, learning_rate=30.0, iterations=3 * batches)
        reconstruct(block, learned, wild)
        assert all(bool((weight.upper == 4.0).all()) for weight in learned.values())
        ruined = clippings(block)
        reconstruct(block, ruined, replace(wild, keep_best=False))
        assert loss_of(block, ruined) > 2 * loss_of(block, learned)

    in_first_block(check, batches=token_batches(batches))


def test_experts_are_trained_in_their_stacks() -> None:
    def check(block: Block) -> None:
        learned = clippings(block)
        assert sum("gate_up_proj[" in key for key in learned) == 4
        first, last = reconstruct(block, learned, ADAM)
        assert last < 0.9 * first
        for key in ("mlp.experts.gate_up_proj[0]", "mlp.experts.down_proj[3]"):
            assert bool((learned[key].upper != 4.0).any())

    model = tiny_moe()
    for parameter in model.model.layers.parameters():
        parameter.data *= 8 if parameter.dim() > 1 else 1  # what the experts add is to be seen
    in_first_block(check, model)


@pytest.mark.parametrize("name", ["gpt2", "whisper", "mamba"])
def test_other_blocks_can_be_trained(name: str) -> None:
    """Transposed weights, cross-attention, convolutions and state-space mixers."""
    tiny, trained = MODELS[name], []

    def step(block: Block) -> None:
        learned = clippings(block, block.magnitudes())
        if learned:
            first, last = reconstruct(block, learned, replace(ADAM, iterations=30))
            assert 0 < last < first
            trained.append(block.name)

    walk(tiny.build().eval(), step, [tiny.inputs(torch.float32)] * 2, W3, targets=True)
    assert len(trained) > 1


def test_inputs_are_quantized_as_the_packed_layer_will() -> None:
    """The loss of the first step is that of the layers' own arithmetic."""
    config = hf_lowbit.RTNConfig(bits=4, group_size=32, activation_bits=4)

    def check(block: Block) -> None:
        learned = clippings(block)
        first, _ = reconstruct(block, learned, Training(iterations=1, learning_rate=1e-9, optimizer="adam"))
        module = copy.deepcopy(block.module)
        for key, weight in learned.items():
            layer = module.get_submodule(block.matrices[key].layer)
            layer.weight.data = weight.hard()
            spec = block.matrices[key].layer_spec.activation
            assert spec is not None

            def as_packed(m: nn.Module, args: Any, spec: Any = spec) -> Any:
                codes, scale, _ = quantize_tokens(args[0].reshape(-1, args[0].shape[-1]), spec)
                return ((codes.float() * scale).reshape(args[0].shape),)

            layer.register_forward_pre_hook(as_packed)
        args, kwargs = block.arguments(0)
        output = block.output_of(module(*args, **kwargs))
        assert first == pytest.approx(float((output - block.target(0)).square().mean()), rel=1e-4)
        assert relative(output, block.target(0)) > 0.01

    in_first_block(check, config=config, batches=token_batches(1))
