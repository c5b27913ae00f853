"""Programs that clients of the test Hub run in processes of their own, and what they print about a model."""

import hashlib
import json
from typing import Any

import torch

import hf_lowbit


def fingerprint(model: torch.nn.Module, output: torch.Tensor) -> dict[str, Any]:
    """The SHA-256 of every tensor and of an output."""
    tensors = {name: sha256(value) for name, value in model.state_dict().items()}
    return {"tensors": tensors, "output": sha256(output)}


def sha256(tensor: torch.Tensor) -> str:
    """Of a tensor's bytes."""
    return hashlib.sha256(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()


@torch.no_grad()
def describe_llama(model: Any) -> str:
    """Fingerprint and report of a language model, as one line of JSON."""
    found = fingerprint(model, model(torch.arange(1, 12)[None]).logits)
    return json.dumps(found | {"report": hf_lowbit.report(model).to_dict()})


@torch.no_grad()
def describe_pipeline(pipeline: Any) -> str:
    """Fingerprint and report of a pipeline with a UNet, as one line of JSON."""
    from tests.integrations.tiny_diffusers import run

    found = fingerprint(pipeline.unet, run(pipeline.unet))
    return json.dumps(found | {"report": hf_lowbit.report(pipeline).to_dict()})


TINY_LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 96,
}

MAKE_BASE = """
import sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
from tests.integrations.hub_scripts import TINY_LLAMA
torch.manual_seed(0)
LlamaForCausalLM(LlamaConfig(**TINY_LLAMA)).push_to_hub(sys.argv[1])
"""

# base, repository, "own" for model.push_to_hub or "function" for hf_lowbit.push_to_hub
PUSH_LLAMA = """
import sys, torch, hf_lowbit
from transformers import AutoModelForCausalLM
from tests.integrations.hub_scripts import describe_llama
base, repo, way = sys.argv[1:]
config = hf_lowbit.RTNConfig(bits=4, group_size=32)
model = AutoModelForCausalLM.from_pretrained(base, quantization_config=config)
if way == "own":
    info = model.push_to_hub(repo, max_shard_size="40KB")
else:
    info = hf_lowbit.push_to_hub(model, repo, max_shard_size="40KB", commit_message="tiny")
assert info.oid, info
print(describe_llama(model))
"""

LOAD_LLAMA = """
import sys, torch
import hf_lowbit
from transformers import AutoModelForCausalLM
from tests.integrations.hub_scripts import describe_llama
print(describe_llama(AutoModelForCausalLM.from_pretrained(sys.argv[1])))
"""

PUSH_PIPELINE = """
import sys, torch, hf_lowbit
from diffusers import DDPMPipeline, DDPMScheduler
from tests.integrations.hub_scripts import describe_pipeline
from tests.integrations.tiny_diffusers import unet
torch.manual_seed(0)
pipeline = DDPMPipeline(unet().eval(), DDPMScheduler(num_train_timesteps=4))
hf_lowbit.quantize(pipeline, hf_lowbit.RTNConfig(bits=4, group_size=32))
if sys.argv[2] == "pipeline":
    hf_lowbit.push_to_hub(pipeline, sys.argv[1])
else:
    pipeline.unet.push_to_hub(sys.argv[1])
print(describe_pipeline(pipeline))
"""

LOAD_PIPELINE = """
import sys, torch, hf_lowbit
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel
from tests.integrations.hub_scripts import describe_pipeline
if sys.argv[2] == "pipeline":
    pipeline = DiffusionPipeline.from_pretrained(sys.argv[1])
else:
    pipeline = DDPMPipeline(UNet2DModel.from_pretrained(sys.argv[1]), DDPMScheduler(num_train_timesteps=4))
print(describe_pipeline(pipeline))
"""
