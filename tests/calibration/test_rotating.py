"""The stream's rotation: the same function on every architecture it takes, nothing changed on those it does not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaModel,
    OPTConfig,
    OPTForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from hf_lowbit.calibration import rotating
from hf_lowbit.calibration.heads import rotate_heads
from hf_lowbit.calibration.rotating import Rotated, rotate_stream
from hf_lowbit.calibration.stream import Stream, StreamError, find_stream
from tests.matrix.models import MODELS, fingerprint
from tests.plugins.outliers import outputs_of, relative, walk

SIZES: dict[str, Any] = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2}
MOE = {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
MORE: dict[str, Callable[[], Any]] = {
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(**SIZES, head_dim=16)),  # gains of 1 + weight
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=16)),
    "headless": lambda: LlamaModel(LlamaConfig(**SIZES)),
    "opt": lambda: OPTForCausalLM(OPTConfig(**SIZES, ffn_dim=96)),  # norms and layers with biases
    "phi": lambda: PhiForCausalLM(PhiConfig(**SIZES)),  # attention and MLP read one norm
    "qwen2_moe": lambda: Qwen2MoeForCausalLM(Qwen2MoeConfig(**SIZES, **MOE)),  # experts and one with a gate
}
ROTATED = ["llama", "llama_tied", "gpt2", "qwen3_moe", "mamba", "mamba2", "gemma", "opt", "phi", "qwen2_moe"]
ROTATED += ["whisper"]  # its decoder's
REFUSED = {
    "headless": "the model returns its stream",
    "unet": "no embedding is called",
    "gemma2": "Gemma2RMSNorm, writes into the stream",
}


def build(name: str) -> tuple[Any, dict[str, Any]]:
    """A model whose gains and biases are no ones and zeros, and a call of it."""
    torch.manual_seed(0)
    model = (MODELS[name].build if name in MODELS else MORE[name])().eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += torch.rand_like(parameter) - 0.4
    inputs = MODELS[name].inputs(torch.float32) if name in MODELS else {"input_ids": torch.arange(24)[None]}
    return model, inputs


# 1
@pytest.mark.parametrize("name", ROTATED)
@torch.no_grad()
def test_the_function_stays(name: str) -> None:
    model, inputs = build(name)
    before, embedding = model(**inputs).logits, model.get_input_embeddings().weight.clone()
    done = rotate_stream(model, [inputs])
    assert done.readers and done.notes[0].startswith("the residual stream is rotated")
    assert relative(model(**inputs).logits, before) < 1e-5
    assert relative(model.get_input_embeddings().weight, embedding) > 0.5
    gains = [p for n, p in model.named_parameters() if p.dim() == 1 and p.unique().numel() == 1]
    assert len(gains) >= len(find_stream(model, inputs).norms), "gains are folded"


@torch.no_grad()
def test_in_float64_it_is_exact() -> None:
    model, inputs = build("llama")
    model.double()
    before = model(**inputs).logits
    rotate_stream(model, [inputs], seed=5)
    assert relative(model(**inputs).logits, before) < 1e-6, "norms compute in float32"
    assert {p.dtype for p in model.parameters()} == {torch.float64}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_stays_as_it_was(name: str) -> None:
    model, inputs = build(name)
    before, parameters = fingerprint(model), dict(model.named_parameters())
    done = rotate_stream(model, [inputs])
    assert done == Rotated(done.notes) and REFUSED[name] in done.notes[0]
    assert fingerprint(model) == before
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rotation_that_does_not_hold_is_undone(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """A reader is overlooked: the tied model gets back every bit, and its tie."""
    model, inputs = build("llama_tied")
    model.to(dtype)
    before = fingerprint(model)

    def overlooking(model: nn.Module, batch: dict[str, Any]) -> Stream:
        stream = find_stream(model, batch)
        norms = {norm: readers[:-1] if "layers.1" in norm else readers for norm, readers in stream.norms.items()}
        return Stream(stream.width, stream.writers, norms, stream.readers)

    monkeypatch.setattr(rotating, "find_stream", overlooking)
    assert "is not the same: it differs by" in rotate_stream(model, [inputs]).notes[0]
    assert fingerprint(model) == before and {p.dtype for p in model.parameters()} == {dtype}
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_bfloat16_models_stay_so_and_are_rounded_once() -> None:
    model, inputs = build("llama")
    exact = copy.deepcopy(model.bfloat16()).float()
    rotate_stream(model, [inputs])
    rotate_stream(exact, [inputs])
    for (name, parameter), other in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert torch.equal(parameter, other.bfloat16()), name


def test_a_stream_names_writers_norms_and_readers() -> None:
    model, inputs = build("qwen3_moe")
    stream = find_stream(model, inputs)
    assert stream.width == 64 and not stream.readers
    blocks = [f"model.layers.{i}" for i in range(2)]
    wrote = [f"{block}.{name}" for block in blocks for name in ("self_attn.o_proj", "mlp.experts")]
    assert stream.writers == ("model.embed_tokens", *wrote)
    assert stream.norms["model.norm"] == ("lm_head",)
    assert set(stream.norms["model.layers.1.post_attention_layernorm"]) == {
        "model.layers.1.mlp.gate",
        "model.layers.1.mlp.experts",
    }


def test_a_layer_that_the_data_does_not_reach_is_a_reason_to_refuse() -> None:
    model, inputs = build("llama")
    model.model.extra = nn.Linear(64, 64)
    with pytest.raises(StreamError, match=r"model\.extra is not called on the data"):
        find_stream(model, inputs)


class Gated(nn.Module):
    """A stream that is multiplied channel by channel: no rotation commutes with that."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.gate, self.head = (
            nn.Embedding(16, 8), nn.RMSNorm(8), nn.Linear(8, 8), nn.Linear(8, 16),
        )  # fmt: skip

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        x = self.embed(input_ids)
        x = x * self.gate(self.norm(x)).sigmoid()
        return {"logits": self.head(self.norm(x))}


def test_channels_that_are_multiplied_are_refused() -> None:
    model = Gated().eval()
    assert "not rotated" in rotate_stream(model, [{"input_ids": torch.arange(8)[None]}]).notes[0]


# 5
@pytest.mark.parametrize(
    ("name", "head"), [("llama", 16), ("qwen3_moe", 16), ("opt", 16), ("gpt2", None), ("mamba", None)]
)
def test_heads_of_values_are_rotated_and_nothing_else(name: str, head: int | None) -> None:
    model, inputs = build(name)
    rotated = []

    def step(block: Any) -> None:
        before = outputs_of(block)
        rotated.append(rotate_heads(block))
        assert relative(outputs_of(block), before) < 1e-5

    walk(model, step, [inputs])
    output = "self_attn.out_proj" if name == "opt" else "self_attn.o_proj"
    assert rotated == [{} if head is None else {output: head}] * 2
