"""What a layer loses at each candidate is what its definition says, and the model stays as it was."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hf_lowbit
from hf_lowbit.calibration.divergence import SensitivityError, group_divergences, logit_divergence
from hf_lowbit.calibration.fusing import fused_groups, merged, tied_groups
from hf_lowbit.calibration.sensitivity import (
    Candidates,
    block_losses,
    measure_layers,
    output_losses,
    relative_damage,
)
from hf_lowbit.calibration.substitution import substituted
from hf_lowbit.integrations.loading import model_facts
from hf_lowbit.plan import PlannedLayer, build_plan
from hf_lowbit.rounding import RoundingError, round_to_nearest
from hf_lowbit.state import shared_weights
from tests.matrix.models import MODELS

WIDTHS = (2, 4, 8)


def candidates_of(model: nn.Module, **fields: Any) -> dict[str, list[PlannedLayer]]:
    facts = model_facts(model, shared_weights(model))
    configs = [hf_lowbit.RTNConfig(bits=bits, group_size=32, **fields) for bits in WIDTHS]
    plans = [build_plan(model, config, facts).layers for config in configs]
    return {name: [plan[name] for plan in plans] for name in plans[0]}


def tiny(name: str) -> tuple[nn.Module, list[dict[str, Any]]]:
    torch.manual_seed(0)
    model = MODELS[name].build().eval()
    return model, [MODELS[name].inputs(torch.float32)] * 2


def state_of(model: nn.Module) -> dict[str, tuple[int, Tensor]]:
    return {name: (p.data_ptr(), p.detach().clone()) for name, p in model.named_parameters()}


def assert_same(model: nn.Module, before: dict[str, tuple[int, Tensor]]) -> None:
    for name, parameter in model.named_parameters():
        assert parameter.data_ptr() == before[name][0] and torch.equal(parameter, before[name][1])


def outputs_of(model: nn.Module, name: str, batch: dict[str, Any]) -> Tensor:
    seen: list[Tensor] = []
    hook = model.get_submodule(name).register_forward_hook(
        lambda m, args, output: seen.append(output[0] if isinstance(output, tuple) else output)
    )
    with torch.no_grad():
        model(**batch)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("measure", [block_losses, output_losses])
def test_every_layer_is_measured_and_nothing_changed(name: str, measure: Any) -> None:
    model, batches = tiny(name)
    candidates = candidates_of(model, quantize_embeddings=name != "unet", quantize_lm_head=True)
    before = state_of(model)
    found = measure_layers(model, candidates, batches, measure)
    assert_same(model, before)
    assert set(found.losses) == set(candidates)
    for losses in found.losses.values():
        assert losses[0] > losses[1] > losses[2] > 0
    expected = {name for name, options in candidates.items() if options[0].kind == "embedding"}
    assert expected <= set(found.notes)
    assert not any("layers." in name for name in found.notes)


@pytest.mark.parametrize("layer", ["layers.1.self_attn.k_proj", "layers.0.mlp.down_proj"])
def test_output_is_the_mean_squared_error_of_the_layer(layer: str) -> None:
    """By its definition: the layer's output with its weight rounded, on the inputs that the float model feeds it."""
    model, batches = tiny("llama")
    candidates = candidates_of(model)
    name = f"model.{layer}"
    losses = measure_layers(model, candidates, batches, output_losses).losses[name]
    exact = outputs_of(model, name, batches[0])
    for option, loss in zip(candidates[name], losses, strict=True):
        with substituted(model, {name: option}, round_to_nearest):
            error = F.mse_loss(outputs_of(model, name, batches[0]), exact)
        assert loss == pytest.approx(error.item(), rel=1e-3)


def test_experts_count_by_their_tokens() -> None:
    """The error of a stack of experts, mean over all values that they compute."""
    model, batches = tiny("qwen3_moe")
    candidates = candidates_of(model)
    name = "model.layers.0.mlp.experts"
    loss = measure_layers(model, candidates, batches, output_losses).losses[name][0]
    experts: Any = model.get_submodule(name)
    calls: list[Any] = []
    hook = experts.register_forward_pre_hook(lambda m, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    with torch.no_grad():
        model(**batches[0])
    hook.remove()
    from hf_lowbit.calibration.experts import expert_inputs

    inputs = list(expert_inputs(experts, *calls[0]))
    exact = [F.linear(x, getattr(experts, parameter)[expert]) for parameter, expert, x in inputs]
    with substituted(model, {name: candidates[name][0]}, round_to_nearest):
        rounded = [F.linear(x, getattr(experts, parameter)[expert]) for parameter, expert, x in inputs]
    values = torch.cat([(a - b).square().reshape(-1) for a, b in zip(exact, rounded, strict=True)])
    assert loss == pytest.approx(values.mean().item(), rel=1e-3)


@pytest.mark.parametrize("layer", ["self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj"])
def test_hessian_is_the_damage_to_the_block(layer: str) -> None:
    """At the middle candidate it is what the block's output loses when the layer alone is rounded, from its definition;
    at the others it follows the trace."""
    model, batches = tiny("llama")
    candidates = candidates_of(model)
    name, block = f"model.layers.1.{layer}", "model.layers.1"
    losses = measure_layers(model, candidates, batches, block_losses).losses[name]
    traces = measure_layers(model, candidates, batches, output_losses).losses[name]
    exact = outputs_of(model, block, batches[0])
    with substituted(model, {name: candidates[name][1]}, round_to_nearest):
        moved = outputs_of(model, block, batches[0])
    damage = ((moved - exact).square().sum(-1) / exact.square().sum(-1)).mean()
    assert losses[1] == pytest.approx(damage.item(), rel=1e-3)
    for loss, trace in zip(losses, traces, strict=True):
        assert loss / losses[1] == pytest.approx(trace / traces[1], rel=1e-4)


def test_the_scale_of_a_stream_does_not_matter() -> None:
    """A block that reads and returns a hundred times as much loses the same share; the metric "output" sees 1e4 times
    as much."""

    def build(gain: float) -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False))
        with torch.no_grad():
            model[0].weight *= gain
        return Wrapped(model)

    losses = {}
    for gain in (1.0, 128.0):
        model = build(gain)
        for measure in (block_losses, output_losses):
            batches = [{"x": torch.randn(64, 32, generator=torch.Generator().manual_seed(1))}]
            losses[gain, measure] = measure_layers(model, candidates_of(model), batches, measure).losses["blocks.1"]
    assert losses[128.0, block_losses] == pytest.approx(losses[1.0, block_losses], rel=1e-4)
    assert losses[128.0, output_losses] == pytest.approx([2**14 * x for x in losses[1.0, output_losses]], rel=1e-4)


class Wrapped(nn.Module):
    def __init__(self, blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = blocks

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


def test_single_huge_tokens_do_not_decide() -> None:
    y = torch.ones(100, 4)
    y[0] *= 1e4
    moved = y + 0.1
    assert relative_damage(y, moved) == pytest.approx(0.01 * 0.99, rel=1e-3)
    y[1] = 0  # nor do tokens that are zero
    assert relative_damage(y, y + 0.1) < 0.2
    assert relative_damage(y, y) == 0 and relative_damage(0 * y, 0 * y) == 0


def test_a_layer_that_no_token_reaches_counts_with_its_weights() -> None:
    model, batches = tiny("llama")
    spare = nn.Linear(64, 64, bias=False)
    model.model.add_module("spare", spare)
    candidates = candidates_of(model)
    found = measure_layers(model, candidates, batches, block_losses)
    assert set(found.notes) == {"model.spare"}
    with substituted(model, {"model.spare": candidates["model.spare"][0]}, round_to_nearest):
        rounded = spare.weight.detach().clone()
    expected = (rounded - spare.weight).norm() ** 2 / spare.weight.norm() ** 2
    assert found.losses["model.spare"][0] == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("layer", ["layers.0.mlp.up_proj", "embed_tokens"])
def test_weights_that_cannot_be_rounded_are_named(layer: str) -> None:
    model, batches = tiny("llama")
    with torch.no_grad():
        model.get_submodule(f"model.{layer}").weight[200 % 96, 3] = float("inf")
    before = state_of(model)
    candidates = candidates_of(model, quantize_embeddings=True)
    with pytest.raises(RoundingError, match=rf"model\.{layer}\.weight"):
        measure_layers(model, candidates, batches, output_losses)
    with pytest.raises(RoundingError, match=rf"model\.{layer}\.weight"):
        group_divergences(model, [[f"model.{layer}"]], candidates, batches, round_to_nearest)
    assert_same(model, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kl_is_that_of_the_rounded_model(dtype: torch.dtype) -> None:
    model, batches = tiny("llama_tied")
    model = model.to(dtype)
    candidates: Candidates = candidates_of(model, quantize_embeddings=True)
    groups = [["model.embed_tokens", "lm_head"], ["model.layers.0.mlp.up_proj", "model.layers.0.mlp.gate_proj"]]
    before = state_of(model)
    found = group_divergences(model, groups, candidates, batches, round_to_nearest)
    assert_same(model, before)
    reference = model(**batches[0]).logits
    for group, losses in zip(groups, found, strict=True):
        for index, loss in enumerate(losses):
            changed = copy.deepcopy(model)
            with substituted(changed, {name: candidates[name][index] for name in group}, round_to_nearest):
                logits = changed(**batches[0]).logits
            p, q = (x.reshape(-1, 256).double().log_softmax(-1) for x in (reference, logits))
            assert loss == pytest.approx(F.kl_div(q, p, log_target=True, reduction="batchmean").item(), rel=1e-3)


def test_divergence_is_exact_where_it_is_tiny_and_where_it_is_huge() -> None:
    p = torch.randn(5, 1000)
    for change in (1e-4 * torch.randn(5, 1000), torch.randn(5, 1000), 300 * torch.randn(5, 1000)):
        q = p + change
        exact = F.kl_div(q.double().log_softmax(-1), p.double().log_softmax(-1), log_target=True, reduction="none").sum(
            -1
        )
        torch.testing.assert_close(logit_divergence(p, q).double(), exact, rtol=2e-3, atol=0)
    assert not logit_divergence(p, p).any()


def test_kl_needs_logits() -> None:
    model, batches = tiny("unet")
    with pytest.raises(SensitivityError, match="UNet2DModel returns none"):
        group_divergences(model, [["conv_in"]], candidates_of(model), batches, round_to_nearest)


def test_what_kernels_fuse_is_grouped() -> None:
    model, batches = tiny("qwen3_moe")
    layers = {name: options[0] for name, options in candidates_of(model).items()}
    groups = {
        tuple(name.removeprefix("model.layers.") for name in group) for group in fused_groups(model, layers, batches[0])
    }
    attention = {(*(f"{i}.self_attn.{x}_proj" for x in "qkv"),) for i in range(2)}
    alone = {(f"{i}.{name}",) for i in range(2) for name in ("self_attn.o_proj", "mlp.experts", "mlp.gate")}
    assert attention <= groups <= attention | alone
    whisper, batches = tiny("whisper")
    layers = {name: options[0] for name, options in candidates_of(whisper).items()}
    prefix = "model.decoder.layers.0.encoder_attn."
    groups = {frozenset(group) for group in fused_groups(whisper, layers, batches[0])}
    assert {frozenset((f"{prefix}k_proj", f"{prefix}v_proj")), frozenset((f"{prefix}q_proj",))} <= groups


def test_listed_experts_share_whether_tokens_reach_them_or_not() -> None:
    class Router(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            make = functools.partial(nn.Linear, 32, 32)
            self.experts = nn.ModuleList([nn.ModuleDict({"up": make(), "down": make()}) for _ in range(3)])
            self.up, self.gate, self.other = make(), make(), nn.Sequential(make())

        def forward(self, x: Tensor) -> Tensor:
            one = self.experts[1]
            return one["down"](one["up"](x)) + self.up(x) * self.gate(x) + self.other(x)

    model = Router()
    layers = {name: options[0] for name, options in candidates_of(model).items()}
    groups = fused_groups(model, layers, {"x": torch.randn(2, 32)})
    experts = [f"experts.{i}.{name}" for i in range(3) for name in ("up", "down")]
    assert groups == [experts, ["up", "gate"], ["other.0"]]


def test_tied_layers_are_one_group() -> None:
    model, _ = tiny("llama_tied")
    layers = {name: options[0] for name, options in candidates_of(model, quantize_embeddings=True).items()}
    groups = tied_groups(model, layers)
    assert [group for group in groups if len(group) > 1] == [["model.embed_tokens", "lm_head"]]


def test_groupings_are_merged() -> None:
    assert merged([["a"], ["b"], ["c"], ["d"]], [["b", "c"]], [["c", "d"]]) == [["a"], ["b", "c", "d"]]
    assert merged([["a", "b"], ["c"]], [["b", "c"]]) == [["a", "b", "c"]]
