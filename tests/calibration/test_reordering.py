"""Reordering a mixer's heads and channels: the same function on every mixer of Mamba-2's kind, or a refusal."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, Mamba2Config, Mamba2ForCausalLM

from hf_lowbit.calibration.reordering import permute_mixer
from hf_lowbit.transforms.reorder import ReorderError, Reordering
from tests.integrations.tiny_state_space import TINY, falcon_h1, mixers_of, relative, step, tokens

SECOND = [name for name, tiny in TINY.items() if tiny.generation == 2]
HEADS, WIDTH, GROUPS = 4, 16, 2


def shuffled(groups: int = GROUPS, seed: int = 0, heads: Tensor | None = None) -> Reordering:
    """Random orders of heads in their groups and of channels in their heads."""
    generator = torch.Generator().manual_seed(seed)
    size = HEADS // groups
    if heads is None:
        heads = torch.cat([torch.randperm(size, generator=generator) + size * group for group in range(groups)])
    inner = torch.stack([torch.randperm(WIDTH, generator=generator) for _ in range(HEADS)])
    ends = torch.ones(1, 1, dtype=torch.int32)
    return Reordering(heads, (heads[:, None] * WIDTH + inner[heads]).flatten(), ends, ends)


def permuted(name: str, model: Any, seed: int = 0, heads: Tensor | None = None, groups: int = GROUPS) -> Any:
    model = copy.deepcopy(model)
    for mixer in mixers_of(model, TINY[name].mixer).values():
        before = {key: parameter.clone() for key, parameter in mixer.named_parameters()}
        permute_mixer(mixer, shuffled(groups, seed, heads))
        changed = {key for key, parameter in mixer.named_parameters() if not torch.equal(parameter, before[key])}
        assert changed == set(before) - {"out_proj.bias"}, "everything that has a place for heads or channels"
    return model


@torch.no_grad()
def logits_of(model: Any) -> list[Tensor]:
    """Of a prefill, and of a shorter one with single tokens after it."""
    x = tokens(2, 11)
    cache = DynamicCache(config=model.config)
    parts = [step(model, part, cache) for part in (x[:, :6], *x[:, 6:].split(1, 1))]
    return [model(x, use_cache=False).logits, torch.cat(parts, 1)]


# 1
@pytest.mark.parametrize("name", SECOND)
def test_the_function_stays(name: str) -> None:
    model = TINY[name].create()
    model.double() if name == "mamba2" else None
    before = logits_of(model)
    for seed in range(2):
        for new, old in zip(logits_of(permuted(name, model, seed + 1)), before, strict=True):
            assert relative(new, old) < 1e-5


# 1
@pytest.mark.parametrize("groups", [1, 4])
def test_of_any_number_of_groups(groups: int) -> None:
    sizes = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "chunk_size": 8}
    torch.manual_seed(0)
    config = Mamba2Config(**sizes, num_heads=HEADS, head_dim=WIDTH, n_groups=groups)
    model = Mamba2ForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    new = copy.deepcopy(model)
    for mixer in mixers_of(new, "Mamba2Mixer").values():
        permute_mixer(mixer, shuffled(groups, 1))
    for ours, theirs in zip(logits_of(new), logits_of(model), strict=True):
        assert relative(ours, theirs) < 5e-6


# 1
def test_heads_that_leave_their_group_change_the_function() -> None:
    model = TINY["mamba2"].create()
    across = permuted("mamba2", model, heads=torch.tensor([2, 1, 0, 3]))
    assert relative(logits_of(across)[0], logits_of(model)[0]) > 0.05


def test_a_multiplier_that_is_not_constant_is_refused() -> None:
    """A reloaded model would multiply other channels."""
    model = falcon_h1()
    mixer = next(iter(mixers_of(model, "FalconH1Mixer").values()))
    mixer.mup_vector[..., 70] += 1  # of x
    with pytest.raises(ReorderError, match="mup_vector differs"):
        permute_mixer(mixer, shuffled(seed=1))


def test_what_is_packed_already_is_refused_before_anything_changes() -> None:
    mixer = next(iter(mixers_of(TINY["mamba2"].create(), "Mamba2Mixer").values()))
    mixer.D = torch.nn.Parameter(mixer.D.int(), requires_grad=False)
    before = mixer.in_proj.weight.clone()
    with pytest.raises(ReorderError, match=r"D is \[4\] torch.int32, not 4 floats"):
        permute_mixer(mixer, shuffled(seed=1))
    assert torch.equal(mixer.in_proj.weight, before)
