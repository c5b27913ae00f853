"""Low-rank factors weighted by the inputs of a block's layers, collected when its first matrix is packed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import hf_lowbit
from hf_lowbit import ConfigError, GPTQConfig, LowRankConfig, RTNConfig
from hf_lowbit.calibration.block import Block
from hf_lowbit.calibration.low_rank import Compensation
from hf_lowbit.calibration.walk import Walk, Walked
from hf_lowbit.compensation import low_rank_factors
from hf_lowbit.formats import decode
from hf_lowbit.integrations.loading import model_facts
from hf_lowbit.nn import Hadamard, PackedLinear
from hf_lowbit.plan import build_plan, packed_modules
from hf_lowbit.rounding import round_to_nearest
from hf_lowbit.state import shared_weights
from hf_lowbit.tensorwise import pack_parameter
from tests.calibration.processes import run_in_two
from tests.matrix.models import MODELS

RANK = 4
CONFIG = RTNConfig(bits=2, group_size=32, num_samples=8, low_rank=LowRankConfig(RANK))
METRICS = ("identity", "mean_abs", "diag", "full")


def llama() -> nn.Module:
    """A block whose layers read channels of very different size."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes)).eval()
    for layer in model.model.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight.data.copy_(torch.linspace(0.1, 3, 64))
    return model


def tokens(count: int = 4) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(0, 256, (2, 24), generator=generator)} for _ in range(count)]


def walked(model: nn.Module, step: Callable[[Block], None], metric: str = "full", config: Any = CONFIG) -> Walked:
    plan = build_plan(model, config, model_facts(model, shared_weights(model)))
    compensation = Compensation({name: layer.spec.low_rank for name, layer in plan.layers.items()}, metric)
    return Walk(model, plan.layers, step, tokens(), pack_parameter, compensation=compensation).run()


def nearest(block: Block) -> None:
    for key, matrix in block.matrices.items():
        block.pack(key, round_to_nearest(matrix.weight, matrix.spec))


@pytest.mark.parametrize("metric", METRICS)
def test_the_factors_are_those_of_the_blocks_inputs(metric: str) -> None:
    """EoRA's sequential pass: inputs come from packed blocks, and from float layers of this one."""
    model = llama()
    expected: dict[str, tuple[Tensor, Tensor]] = {}

    def step(block: Block) -> None:
        hessians = block.hessians()
        assert hessians["self_attn.q_proj.weight"] is hessians["self_attn.k_proj.weight"]
        for key, hessian in hessians.items():
            weight, spec = block.matrices[key].weight.clone(), block.matrices[key].spec
            packed = round_to_nearest(weight, spec)
            diagonal = hessian.matrix.diagonal().sqrt()
            weighting = {"identity": None, "diag": diagonal, "full": hessian.matrix}.get(metric)
            if metric != "mean_abs":
                expected[f"{block.name}.{key}"] = low_rank_factors(weight - decode(packed), RANK, weighting)
            block.pack(key, packed)

    walked(model, step, metric)
    modules = packed_modules(model)
    assert len(modules) == 14
    for key, (a, b) in expected.items():
        factors = modules[key.removesuffix(".weight")].low_rank_factors("weight", torch.float32)
        assert factors is not None
        product = factors[1] @ factors[0]
        assert (product - b @ a).norm() < 0.01 * product.norm(), key  # stored as bfloat16


def test_each_metric_leaves_less_of_the_output() -> None:
    """Specification, correctness test 4: full <= diag, mean_abs, identity on the calibration data, for every layer."""
    left: dict[str, dict[str, float]] = {}
    for metric in METRICS:
        model, moments = llama(), dict[str, Tensor]()

        def step(block: Block, moments: dict[str, Tensor] = moments) -> None:
            if block.name.endswith(".0"):
                moments.update({key: statistic.matrix.double() for key, statistic in block.hessians().items()})
            nearest(block)

        walked(model, step, metric)
        block, original = model.model.layers[0], llama().model.layers[0]
        for key, moment in moments.items():
            name = key.removesuffix(".weight")
            packed = block.get_submodule(name)
            assert isinstance(packed, PackedLinear)
            error = (original.get_submodule(name).weight.detach() - packed.dequantized()).double()
            left.setdefault(key, {})[metric] = float(torch.einsum("ij,jk,ik->", error, moment, error))
    assert len(left) == 7
    for key, errors in left.items():
        assert errors["full"] <= 1.005 * min(errors.values()), (key, errors)
    first = left["self_attn.q_proj.weight"]
    assert first["full"] < first["diag"] < 0.95 * first["identity"] and first["mean_abs"] < 0.95 * first["identity"]


@pytest.mark.parametrize("metric", ["mean_abs", "diag", "full"])
def test_a_transformed_layer_is_solved_in_its_own_coordinates(metric: str) -> None:
    """A transform that is set just before packing: the statistic of the input is turned with it."""
    model = llama()
    weightings: dict[str, Any] = {}

    def pack(module: Any, parameter: str, weight: Any, packed: Any, where: str, **repair: Any) -> Any:
        weightings[where] = repair["weighting"]
        return pack_parameter(module, parameter, weight, packed, where, **repair)

    def step(block: Block) -> None:
        inputs: list[Tensor] = []
        layer = block.module.get_submodule("mlp.up_proj")
        handle = layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0].reshape(-1, 64).clone()))
        for batch in range(len(block)):
            block.run(batch)
        handle.remove()
        key = "mlp.up_proj.weight"
        block.pack("mlp.down_proj.weight", round_to_nearest(*_parts(block, "mlp.down_proj.weight")))
        skeleton = block.matrices[key].skeleton
        assert isinstance(skeleton, PackedLinear)
        skeleton.set_transform(Hadamard(64))
        block.pack(key, round_to_nearest(*_parts(block, key)))
        x = skeleton.transformed(torch.cat(inputs))
        found = weightings[f"{block.name}.mlp.up_proj"]
        if metric == "full":
            torch.testing.assert_close(found, x.T @ x / len(x), rtol=1e-3, atol=1e-3)
        elif metric == "diag":
            torch.testing.assert_close(found, x.square().mean(0).sqrt(), rtol=1e-3, atol=1e-3)
        else:
            batches = torch.stack([part.abs().mean(0) for part in x.chunk(len(block))]).amax(0)
            torch.testing.assert_close(found / found.norm(), batches / batches.norm(), rtol=1e-3, atol=1e-3)

    plan = build_plan(model, CONFIG, model_facts(model, shared_weights(model)))
    compensation = Compensation(dict.fromkeys(plan.layers, RANK), metric)
    Walk(model, plan.layers, step, tokens(), pack, compensation=compensation).run()


def _parts(block: Block, key: str) -> Any:
    return block.matrices[key].weight, block.matrices[key].spec


def test_a_methods_own_factors_are_stored_as_they_are() -> None:
    model, given = llama(), dict[str, tuple[Tensor, Tensor]]()

    def step(block: Block) -> None:
        for key, matrix in block.matrices.items():
            rows, columns = matrix.weight.shape
            a, b = torch.randn(RANK, columns).bfloat16().float(), torch.randn(rows, RANK).bfloat16().float()
            given[f"{block.name}.{matrix.layer}"] = a, b
            block.pack(key, round_to_nearest(matrix.weight - b @ a, matrix.spec), factors=(a, b))

    walked(model, step, "identity")
    for name, pair in given.items():
        found = packed_modules(model)[name].low_rank_factors("weight", torch.float32)
        assert found is not None and all(map(torch.equal, found, pair))


def test_experts_have_their_own_and_unreached_ones_say_so() -> None:
    torch.manual_seed(0)
    model = MODELS["qwen3_moe"].build().eval()
    data = [{"input_ids": torch.full((2, 8), 7)}] * 4  # one token again and again: two of four experts
    config = RTNConfig(bits=2, group_size=16, num_samples=8, low_rank=LowRankConfig(RANK, metric="full"), dataset=data)
    quantized = hf_lowbit.quantize(model, config)
    noted = [line for line in hf_lowbit.report(quantized).warnings if line.startswith("model.layers.0.mlp.experts")]
    assert len(noted) == 4  # gate_up and down of two
    reason = "its low-rank part takes metric='identity' (no token of the calibration data reaches it)"
    assert all(line.endswith(reason) for line in noted)
    experts = quantized.model.layers[0].mlp.experts
    assert experts.gate_up_proj_low_rank_a.shape == (4, 2 * RANK, 64)
    assert experts.low_rank_factors("down_proj", torch.float32, 1)[0].shape == (RANK, 32)


def test_what_has_no_inputs_takes_the_error_of_the_weight() -> None:
    config = replace(CONFIG, low_rank=LowRankConfig(RANK, metric="full"), quantize_embeddings=True, dataset=tokens())
    model = hf_lowbit.quantize(llama(), config)
    noted = [line for line in hf_lowbit.report(model).warnings if "metric='identity'" in line]
    assert noted == [
        "model.embed_tokens.weight: an embedding, or tied to one: its low-rank part takes metric='identity'"
    ]


def test_a_data_free_method_keeps_its_own_rounding() -> None:
    """Its codes are those of the run without data; only the factors differ."""
    plain = hf_lowbit.quantize(llama(), hf_lowbit.HQQConfig(bits=3, group_size=32))
    part = LowRankConfig(RANK, metric="full")
    config = hf_lowbit.HQQConfig(bits=3, group_size=32, num_samples=8, low_rank=part)
    compensated = hf_lowbit.quantize(llama(), config, data=tokens())
    for name, module in packed_modules(compensated).items():
        assert torch.equal(module.get_parameter("weight"), plain.get_submodule(name).weight)
        assert module.low_rank_factors("weight", torch.float32) is not None
    assert not hf_lowbit.report(compensated).warnings


@pytest.mark.parametrize("metric", ["identity", "full"])
def test_in_turns_is_at_least_as_good(metric: str) -> None:
    """LoftQ, on the tensor-wise path and on that of the engine: the best iterate is kept."""
    errors = {}
    for iterations in (1, 4):
        part = LowRankConfig(RANK, metric=metric, iterations=iterations)
        config = replace(CONFIG, low_rank=part, dataset=tokens() if metric == "full" else None)
        model = hf_lowbit.quantize(llama(), config)
        errors[iterations] = {layer.name: layer.error or 0 for layer in hf_lowbit.report(model).layers}
    if metric == "identity":  # what is minimised is what is reported
        assert all(errors[4][name] <= 1.001 * error for name, error in errors[1].items())
    assert sum(errors[4].values()) < 0.97 * sum(errors[1].values())


def test_ranks_of_single_layers() -> None:
    overrides = {"down_proj": {"low_rank": 2}, "q_proj": {"low_rank": 0}}
    part = LowRankConfig(RANK, metric="diag")
    model = hf_lowbit.quantize(llama(), replace(CONFIG, low_rank=part, overrides=overrides), data=tokens())
    ranks = {name.rpartition(".")[2]: module.layer_spec.low_rank for name, module in packed_modules(model).items()}
    assert (ranks["down_proj"], ranks["q_proj"], ranks["k_proj"]) == (2, 0, RANK)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            RTNConfig(low_rank=LowRankConfig(4, metric="full")),
            r"low_rank.metric='full' needs calibration data.*dataset='self'",
        ),
        (RTNConfig(low_rank=LowRankConfig(4, keep="fused")), r"low_rank.keep='fused' needs calibration data"),
        (RTNConfig(low_rank=LowRankConfig(4, budget_bits=5)), r"low_rank.budget_bits=5 needs calibration data"),
        (GPTQConfig(low_rank=LowRankConfig(4, iterations=3), dataset=["text"]), "'gptq' cannot: it chooses codes once"),
    ],
    ids=["metric", "fused", "budget", "iterations"],
)
def test_what_cannot_be_is_refused_before_work_starts(config: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        hf_lowbit.quantize(llama(), config)


def compensated(folder: Path, name: str) -> None:
    torch.set_num_threads(1)
    model = llama()
    walked(model, nearest, "diag")
    torch.save(model.state_dict(), folder / name)


def test_two_processes_weigh_as_one(tmp_path: Path) -> None:
    run_in_two(compensated, tmp_path)
    compensated(tmp_path, "alone")
    first, second, alone = (torch.load(tmp_path / name) for name in ("rank0", "rank1", "alone"))
    assert all(torch.equal(second[key], tensor) for key, tensor in first.items())
    for key in [key for key in alone if key.endswith("low_rank_a")]:
        a, b = (values[key].view(torch.bfloat16).float() for values in (first, alone))
        other_a, other_b = (
            values[key.removesuffix("a") + "b"].view(torch.bfloat16).float() for values in (first, alone)
        )
        assert (other_a @ a - other_b @ b).norm() < 0.02 * (other_b @ b).norm(), key
