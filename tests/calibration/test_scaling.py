"""Folding scales into blocks: what stays, what is found, what the search and the formula read."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_lowbit.calibration import scaling
from hf_lowbit.calibration.block import Block
from hf_lowbit.calibration.inspected import OutputError, captured_calls, common_owner, simulated
from hf_lowbit.calibration.scaling import (
    block_sites,
    first_sequence,
    input_magnitude,
    keys_of,
    search_scales,
    smooth,
    storable_scale,
)
from hf_lowbit.calibration.sites import Site
from hf_lowbit.formats import decode
from hf_lowbit.rounding import round_to_nearest
from tests.calibration.gated import GatedModel
from tests.matrix.models import MODELS
from tests.plugins.outliers import one_token, outlier_llama, outputs_of, relative, tiny_moe, token_batches, walk

LANGUAGE = ["llama", "gpt2", "qwen3_moe", "whisper", "mamba2"]


def nearest_in(block: Block) -> Any:
    return lambda key, weight: decode(round_to_nearest(weight, block.matrices[key].spec))


@pytest.mark.parametrize("search", [True, False], ids=["search", "smooth"])
@pytest.mark.parametrize("name", LANGUAGE)
def test_blocks_compute_what_they_did(name: str, search: bool) -> None:
    """Scales are folded, and no output moves."""
    tiny, folded = MODELS[name], []

    def step(block: Block) -> None:
        before = outputs_of(block)
        chosen = search_scales(block, nearest_in(block), 5) if search else smooth(block, 0.5)
        assert relative(outputs_of(block), before) < 1e-5
        folded.extend(chosen)

    walk(tiny.build().eval(), step, [tiny.inputs(torch.float32)] * 2)
    assert folded


@pytest.mark.parametrize("search", [True, False], ids=["search", "smooth"])
def test_folded_norms_survive_being_stored_in_bfloat16(search: bool) -> None:
    """The walk stores floats in the model's type after the codes are chosen: nothing may be lost then."""

    def step(block: Block) -> None:
        before = outputs_of(block)
        weights = block.module.input_layernorm.weight.clone()
        if search:
            search_scales(block, nearest_in(block), 5)
        else:
            smooth(block, 0.5)
        assert not torch.equal(block.module.input_layernorm.weight, weights)
        for norm in (block.module.input_layernorm, block.module.post_attention_layernorm):
            norm.weight.data = norm.weight.data.bfloat16().float()
        assert relative(outputs_of(block), before) < 1e-5

    walk(outlier_llama().bfloat16(), step)


def _norm(weight: Tensor, offset: bool) -> tuple[nn.Module, Site]:
    block = nn.ModuleDict({"norm": nn.Module()})
    block["norm"].weight = nn.Parameter(weight)
    return block, Site("norm", ("layer",), len(weight), offset=offset)


@pytest.mark.parametrize("offset", [False, True])
def test_storable_scales_are_near_and_exact(offset: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(500, generator=generator).bfloat16().float()
    scale = torch.rand(500, generator=generator) * 4 + 0.2
    block, site = _norm(weight, offset)
    near = storable_scale(block, site, scale)
    stored = ((weight.double() + float(offset)) / near - float(offset)).float()
    assert torch.allclose(stored, stored.bfloat16().float(), rtol=1e-6, atol=1e-7)
    assert bool((near > 0).all())
    if not offset:  # beside one, an offset's steps can be coarse
        assert torch.allclose(near, scale.double(), rtol=2**-8)
    else:
        assert torch.allclose(near.log2().median(), scale.double().log2().median(), atol=0.05)


def test_channels_without_a_storable_scale_keep_theirs() -> None:
    block, site = _norm(torch.tensor([0.0, 1.0, -2.0]), False)
    assert storable_scale(block, site, torch.tensor([7.0, 4.0, 0.5])).tolist() == [1.0, 4.0, 0.5]
    block, site = _norm(torch.tensor([-1.0, -0.996]), True)  # 1 + w of 0, and of less than a step after the division
    assert storable_scale(block, site, torch.tensor([7.0, 1000.0])).tolist() == [1.0, 1.0]
    linear = Site("norm", ("layer",), 2, kind="linear")
    assert torch.equal(storable_scale(block, linear, torch.tensor([7.0, 3.3])), torch.tensor([7.0, 3.3]))


def test_experts_together_read_what_their_router_reads() -> None:
    """The joint statistic of routed tokens is that of all tokens."""

    def step(block: Block) -> None:
        magnitudes = block.magnitudes()
        site = next(site for site in block_sites(block) if "mlp.experts" in site.consumers)
        assert any(not keys_of(block, name) for name in site.consumers), "the router is a consumer and stays float"
        read: list[Tensor] = []
        handle = block.module.mlp.register_forward_pre_hook(lambda m, args: read.append(args[0].reshape(-1, 64)))
        outputs_of(block)
        handle.remove()
        whole = input_magnitude(block, site, magnitudes)
        assert whole is not None
        torch.testing.assert_close(whole.mean, torch.cat(read).abs().mean(0), rtol=1e-5, atol=1e-7)
        assert torch.equal(whole.maximum, torch.cat(read).abs().amax(0))

    walk(tiny_moe(), step)


def test_what_nothing_reaches_has_no_statistic() -> None:
    def step(block: Block) -> None:
        magnitudes = block.magnitudes()
        site = next(site for site in block_sites(block) if "mlp.experts" in site.consumers)
        idle = {key: m for key, m in magnitudes.items() if "gate_up_proj" in key and not m.tokens}
        assert len(idle) == 2 and input_magnitude(block, site, idle) is None
        assert input_magnitude(block, site, {}) is None

    walk(tiny_moe(), step, one_token())


def test_smoothing_balances_the_quantized_weights_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A router with huge weights stays float: it is multiplied, and does not count."""
    scales: list[Tensor] = []
    fold = scaling.fold_site
    monkeypatch.setattr(scaling, "fold_site", lambda m, site, scale: (scales.append(scale), fold(m, site, scale))[1])

    def run(router: float) -> list[Tensor]:
        model = tiny_moe()
        for layer in model.model.layers:
            layer.mlp.gate.weight.data *= router
        scales.clear()
        first = []

        def step(block: Block) -> None:
            gate = block.module.mlp.gate.weight.clone()
            smooth(block, 0.5)
            assert not torch.equal(block.module.mlp.gate.weight, gate)
            first.append(list(scales))

        walk(model, step)
        return first[0]

    for a, b in zip(run(1.0), run(1e4), strict=True):
        assert torch.equal(a, b)


def test_a_search_that_finds_nothing_changes_nothing() -> None:
    """Trials are taken back to the last bit; of scales that are all alike, none is folded."""

    def step(block: Block) -> None:
        before = copy.deepcopy(block.module.state_dict())
        chosen = search_scales(block, lambda key, weight: torch.zeros_like(weight), 4)
        assert chosen and not any(chosen.values())
        for name, value in block.module.state_dict().items():
            assert torch.equal(value, before[name])

    walk(outlier_llama(), step)


def test_simulated_layers_come_back_after_a_failure() -> None:
    def step(block: Block) -> None:
        before = copy.deepcopy(block.module.state_dict())

        def fail(key: str, weight: Tensor) -> Tensor:
            raise RuntimeError(key)

        keys = {"self_attn.q_proj": ["self_attn.q_proj.weight"]}
        with pytest.raises(RuntimeError, match="q_proj"), simulated(block, keys, torch.full((64,), 3.0), fail):
            pass
        for name, value in block.module.state_dict().items():
            assert torch.equal(value, before[name])

    walk(outlier_llama(), step)


def test_heads_that_share_a_value_head_are_a_site() -> None:
    def step(block: Block) -> None:
        sites = {site.previous: site for site in block_sites(block)}
        assert set(sites) == {
            "input_layernorm", "post_attention_layernorm", "self_attn.v_proj", "mlp.up_proj",
        }  # fmt: skip
        assert sites["self_attn.v_proj"].repeat == 2
        assert {site.previous for site in block_sites(block, ("norm",))} == {
            "input_layernorm", "post_attention_layernorm",
        }  # fmt: skip

    walk(outlier_llama(), step)


def test_a_layer_that_two_sites_would_scale_belongs_to_one() -> None:
    """A gate that is a norm times a linear layer: both could be divided, statistics are of the input before either."""

    read = []

    def step(block: Block) -> None:
        before = outputs_of(block)
        read.append([site.previous for site in block_sites(block) if "out" in site.consumers])
        smooth(block, 0.5)
        assert relative(outputs_of(block), before) < 1e-5

    walk(GatedModel().eval(), step, [{"x": torch.randn(2, 7, 32)}])
    assert all(len(found) == 1 for found in read)


def test_blocks_without_sites_are_left_alone() -> None:
    """Whisper's convolutions are blocks of one layer: nothing before them can be divided."""
    tiny, single = MODELS["whisper"], []

    def step(block: Block) -> None:
        if len(block.matrices) == 1:
            assert block_sites(block) == [] and smooth(block, 0.5) == []
            assert search_scales(block, nearest_in(block), 3) == {}
            single.append(block.name)

    walk(tiny.build().eval(), step, [tiny.inputs(torch.float32)])
    assert single


def test_a_block_that_returns_nan_is_named() -> None:
    model = outlier_llama()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")

    def step(block: Block) -> None:
        block_sites(block)

    with pytest.raises(ValueError, match=r"model\.layers\.1: the block returns NaN"):
        walk(model, step)


def _calling(*args: Any, **kwargs: Any) -> Any:
    return SimpleNamespace(arguments=lambda batch: (args, kwargs))


def test_the_first_sequence_is_cut_from_a_batch() -> None:
    x, positions, steps = torch.zeros(3, 5, 8), torch.arange(5)[None], torch.arange(3)
    (one,), kwargs = first_sequence(_calling(x, positions=positions, steps=steps, pair=(x, None), flag=True))
    assert one.shape == (1, 5, 8) and kwargs["pair"][0].shape == (1, 5, 8)
    assert kwargs["positions"] is positions and kwargs["steps"].tolist() == [0] and kwargs["flag"] is True


def test_a_batch_of_as_many_sequences_as_tokens_stays_whole() -> None:
    x, mask = torch.zeros(5, 5, 8), torch.zeros(5, 5)
    (same,), kwargs = first_sequence(_calling(x, mask=mask))
    assert same is x and kwargs["mask"] is mask
    assert first_sequence(_calling(steps=torch.arange(3))) == ((), {"steps": pytest.approx(torch.arange(3))})


def test_the_inspected_module_holds_all_consumers_and_can_be_called() -> None:
    block = outlier_llama().model.layers[0]
    assert common_owner(block, ["mlp.down_proj"]) == "mlp.down_proj"
    assert common_owner(block, ["self_attn.q_proj", "self_attn.k_proj"]) == "self_attn"
    assert common_owner(block, ["self_attn.q_proj", "mlp.up_proj"]) == ""
    experts = nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])})
    owner = nn.Module()
    owner.mlp = experts
    assert common_owner(owner, ["mlp.experts.0", "mlp.experts.1"]) == ""
    assert common_owner(nn.Linear(2, 2), [""]) == ""


def test_output_errors_are_squared_sums() -> None:
    def step(block: Block) -> None:
        mlp = block.module.mlp
        calls = captured_calls(block, mlp, 2)
        assert len(calls) == 2
        right = [mlp(*args, **kwargs) for args, kwargs in calls]
        errors = OutputError(mlp, calls, 2)
        assert errors.tokens == 2 * 2 * 48
        weight = mlp.down_proj.weight.clone()
        mlp.down_proj.weight *= 1.5
        errors.measure(1)
        mlp.down_proj.weight.copy_(weight)
        expected = sum(float((0.5 * output).square().sum()) for output in right)
        assert errors.errors.tolist() == pytest.approx([0.0, expected], rel=1e-4)

    walk(outlier_llama(), step, token_batches(3))
