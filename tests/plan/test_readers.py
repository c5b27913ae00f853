"""Owners that read a child's weight themselves are found in their source; others are not suspected."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.clip.modeling_clip import CLIPVisionEmbeddings
from transformers.models.falcon_mamba.modeling_falcon_mamba import FalconMambaForCausalLM
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP
from transformers.models.mamba.modeling_mamba import MambaForCausalLM, MambaMixer
from transformers.models.mamba2.modeling_mamba2 import Mamba2ForCausalLM, Mamba2Mixer
from transformers.models.t5.modeling_t5 import T5DenseActDense, T5DenseGatedActDense
from transformers.models.whisper.modeling_whisper import WhisperAttention

from hf_lowbit.plan.readers import directly_read, type_read


def instance(cls: type[nn.Module]) -> nn.Module:
    """An object of the class; which one does not matter, only its source does."""
    module = cls.__new__(cls)
    nn.Module.__init__(module)
    return module


@pytest.mark.parametrize(
    ("owner", "child"),
    [(MambaMixer, "dt_proj"), (MambaMixer, "conv1d"), (Mamba2Mixer, "conv1d"),
     (T5DenseActDense, "wo"), (T5DenseGatedActDense, "wo")],
)  # fmt: skip
def test_readers_are_found(owner: Any, child: str) -> None:
    assert directly_read(instance(owner), child)


@pytest.mark.parametrize(
    ("owner", "child"),
    [(LlamaMLP, "gate_proj"), (LlamaMLP, "up_proj"), (LlamaMLP, "down_proj"), (LlamaAttention, "q_proj"),
     (GPT2Attention, "c_attn"), (WhisperAttention, "k_proj"), (T5DenseActDense, "wi"), (MambaMixer, "in_proj"),
     (MambaMixer, "out_proj"), (MambaMixer, "x_proj"), (Mamba2Mixer, "in_proj"), (Mamba2Mixer, "out_proj")],
)  # fmt: skip
def test_callers_are_not_suspected(owner: Any, child: str) -> None:
    assert not directly_read(instance(owner), child)


@pytest.mark.parametrize(
    ("owner", "child"),
    [(MambaForCausalLM, "lm_head"), (Mamba2ForCausalLM, "lm_head"), (FalconMambaForCausalLM, "lm_head"),
     (CLIPVisionEmbeddings, "patch_embedding")],
)  # fmt: skip
def test_whose_type_alone_is_read(owner: Any, child: str) -> None:
    assert type_read(instance(owner), child) and not directly_read(instance(owner), child)


@pytest.mark.parametrize("owner", [T5DenseActDense, T5DenseGatedActDense])
def test_whoever_reads_more_is_no_reader_of_types(owner: Any) -> None:
    """T5 asks whether it is a tensor at all."""
    assert not type_read(instance(owner), "wo")


class Caster(nn.Module):
    """Reads the type of one weight, of another elsewhere than in forward, and of a third its values as well."""

    def __init__(self) -> None:
        super().__init__()
        self.cast, self.early, self.used = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)

    def prepare(self, x: Tensor) -> Tensor:
        """Whoever calls this does not call forward."""
        return x.to(self.early.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Forward."""
        x = self.cast(x.to(self.cast.weight.dtype)).to(self.used.weight.dtype)
        return x @ self.used.weight


def test_what_counts_as_reading_a_type() -> None:
    assert type_read(Caster(), "cast") and not directly_read(Caster(), "cast")
    for child in ("early", "used"):
        assert directly_read(Caster(), child) and not type_read(Caster(), child)


class Reader(nn.Module):
    """Reads one weight in forward, another only to initialise it, a third only to see where it lies."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.started, self.placed = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)

    def init_weights(self) -> None:
        """Initialisation."""
        nn.init.zeros_(self.started.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Forward."""
        x = self.placed(x.to(self.placed.weight.device))
        return x @ self.used.weight + self.started(x)


class Inheritor(Reader):
    """Reads through its base class."""


class Decorated(nn.Module):
    """Its method is wrapped."""

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Forward."""
        return x @ self.used.weight


@pytest.mark.parametrize("owner", [Reader, Inheritor])
def test_what_counts_as_reading(owner: type[nn.Module]) -> None:
    assert directly_read(owner(), "used")
    assert not directly_read(owner(), "started")
    assert not directly_read(owner(), "placed")


def test_decorators_do_not_hide_a_reader() -> None:
    assert directly_read(Decorated(), "used")


def test_torch_containers_read_nothing() -> None:
    assert not directly_read(nn.Sequential(nn.Linear(2, 2)), "0")
