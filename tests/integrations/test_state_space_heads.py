"""The heads of Mamba, Mamba-2 and FalconMamba, whose models read the type of their weight: packed as any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import hf_lowbit
from hf_lowbit.nn import PackedLinear
from hf_lowbit.plan import packed_modules
from hf_lowbit_quamba2 import Quamba2Config
from tests.integrations.tiny_peft import perturb
from tests.integrations.tiny_state_space import TINY, relative, tokens

ENDS = {"quantize_embeddings": True, "quantize_lm_head": True}
DATA = [{"input_ids": tokens(4, 24, seed)} for seed in range(2, 6)]


@pytest.fixture(params=["mamba", "mamba2", "falcon_mamba"])
def name(request: Any) -> str:
    return str(request.param)


def rounded(name: str, dtype: torch.dtype = torch.float32, **values: Any) -> Any:
    """Head and embedding alone, in 8 bits; of Mamba and FalconMamba they are tied."""
    fields = {"bits": 8, "group_size": None, "modules_to_not_convert": ["mixer"], **ENDS, **values}
    return hf_lowbit.quantize(TINY[name].create().to(dtype), hf_lowbit.RTNConfig(**fields))


@torch.no_grad()
def logits(model: Any, **arguments: Any) -> Tensor:
    result: Tensor = model(tokens(2, 11), use_cache=False, **arguments).logits
    return result


def is_tied(model: Any) -> bool:
    """Whether the ends have one weight, or one set of codes."""
    return bool(model.lm_head.weight is model.backbone.embeddings.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_the_head_multiplies_what_the_model_casts(name: str, dtype: torch.dtype) -> None:
    """What it reads has the type of the float weight, as before."""
    model, seen = rounded(name, dtype), []
    assert type(model.lm_head) is PackedLinear and "lm_head" not in hf_lowbit.report(model).skipped
    assert is_tied(model) == (name != "mamba2")
    model.lm_head.register_forward_pre_hook(lambda layer, args: seen.append(args[0]))
    found = logits(model)
    assert seen[0].dtype == dtype and found.dtype == torch.float32
    hidden = model.backbone(tokens(2, 11))[0].to(dtype)
    expected = hidden.double() @ model.lm_head.dequantized(dtype=torch.float64).t()
    assert relative(found, expected) < (1e-5 if dtype == torch.float32 else 0.01)
    assert relative(logits(model, logits_to_keep=1), found[:, -1:]) < (1e-5 if dtype == torch.float32 else 0.01)
    assert relative(found, logits(TINY[name].create().to(dtype))) < 0.05


def test_it_generates_and_comes_back(name: str, tmp_path: Path) -> None:
    model = rounded(name)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again), logits(model)) and torch.equal(again.lm_head.weight, model.lm_head.weight)
    ask = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    assert torch.equal(again.generate(tokens(2, 7), **ask), model.generate(tokens(2, 7), **ask))
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.lm_head.output_dtype.dtype == torch.bfloat16 and relative(logits(half), logits(model)) < 0.03
    hf_lowbit.dequantize(model)
    assert type(model.lm_head) is nn.Linear and is_tied(model) == (name != "mamba2")
    assert relative(logits(model), logits(again)) < 1e-5


def test_quantized_while_it_loads(name: str, tmp_path: Path) -> None:
    TINY[name].create().save_pretrained(tmp_path)
    config = hf_lowbit.RTNConfig(bits=8, group_size=None, modules_to_not_convert=["mixer"], **ENDS)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config).eval()
    assert torch.equal(logits(model), logits(rounded(name)))


@pytest.mark.parametrize("bits", [{}, {"bits": 4, "group_size": 16}, {"bits": 4, "activation_bits": None}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quamba2_packs_both_ends(name: str, bits: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    """The rotation unties the head: each has codes of its own, the head's by GPTQ or with a stored input scale."""
    expected = logits(TINY[name].create())
    config = Quamba2Config(**bits, **ENDS, num_samples=16)
    model = hf_lowbit.quantize(TINY[name].create().to(dtype), config, data=DATA)
    embedding, head = (packed_modules(model)[end] for end in ("backbone.embeddings", "lm_head"))
    assert embedding.layer_spec.weight.bits == head.layer_spec.weight.bits == bits.get("bits", 8)
    assert not torch.equal(embedding.weight, head.weight), "rotated, they differ"
    assert (head.input_scale() is not None) == ("activation_bits" not in bits)
    assert head.output_dtype.dtype == dtype, "though it was calibrated in float32"
    assert relative(logits(model), expected) < (0.6 if bits else 0.3)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
    assert torch.equal(logits(again), logits(model))


def test_lora_on_the_head(name: str, tmp_path: Path) -> None:
    lora = LoraConfig(r=4, target_modules=["lm_head"], task_type="CAUSAL_LM")
    model = get_peft_model(hf_lowbit.prepare_for_training(rounded(name), gradient_checkpointing=False), lora)
    before = logits(model)
    perturb(model)
    after = logits(model)
    assert relative(after, before) > 0.01
    model(tokens(2, 11), labels=tokens(2, 11)).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(PeftModel.from_pretrained(rounded(name), tmp_path / "adapter").eval()), after)
    if name == "mamba2":  # merged into a tied head it would change the embedding, as with float weights
        merged = model.eval().merge_and_unload()
        assert type(merged.lm_head) is PackedLinear and relative(logits(merged), after) < 0.01


def test_compiled_whole_it_is_the_same() -> None:
    model = rounded("mamba2")  # transformers' own scan of Mamba takes a graph for every token
    compiled = torch.compile(model, backend="aot_eager")
    assert relative(logits(compiled), logits(model)) < 1e-5
    assert type(model.lm_head) is PackedLinear


def test_offloaded_to_disk(name: str, tmp_path: Path) -> None:
    """Its codes are read while the model runs, when the model's attribute is not the layer."""
    model = rounded(name)
    model.save_pretrained(tmp_path / "saved")
    ends = "disk" if is_tied(model) else "cpu"
    places = {"backbone.embeddings": ends, "backbone.layers": "cpu", "backbone.norm_f": "cpu", "lm_head": "disk"}
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", device_map=places, offload_folder=tmp_path / "offload"
    )
    assert again.lm_head.weight.is_meta and torch.equal(logits(again), logits(model))


def test_saved_plainly(name: str, tmp_path: Path) -> None:
    """Without transformers' loader the type is in the file."""
    model = rounded(name).to(torch.bfloat16)
    hf_lowbit.save(model, tmp_path)
    again: Any = hf_lowbit.load(tmp_path, TINY[name].create())
    assert again.lm_head.output_dtype.dtype == torch.bfloat16
    assert relative(logits(again.to(torch.bfloat16)), logits(model)) < 0.02
