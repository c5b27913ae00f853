"""A quantized checkpoint on a machine without hf_lowbit: loading fails, it never goes on with other weights."""

import subprocess
import sys
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM

import hf_lowbit
from hf_lowbit import LowRankConfig, RTNConfig
from tests.integrations.hub_scripts import TINY_LLAMA
from tests.integrations.tiny_diffusers import unet

WITHOUT = """
import sys
sys.modules["hf_lowbit"] = None  # what importing it would do where it is not installed: ImportError
{load}
print("loaded")
"""
TRANSFORMERS = "from transformers import AutoModelForCausalLM\nAutoModelForCausalLM.from_pretrained(sys.argv[1])"
DIFFUSERS = "from diffusers import UNet2DModel\nUNet2DModel.from_pretrained(sys.argv[1])"


def stderr_of(load: str, folder: Path) -> str:
    """What loading prints as it fails, in a process that cannot import hf_lowbit."""
    command = [sys.executable, "-c", WITHOUT.format(load=load), str(folder)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode != 0 and "loaded" not in done.stdout, done.stdout
    return done.stderr


def llama() -> LlamaForCausalLM:
    from transformers import LlamaConfig

    return LlamaForCausalLM(LlamaConfig(**TINY_LLAMA))


@pytest.mark.parametrize(
    "values",
    [
        {"bits": 4, "group_size": 32},
        {"bits": 8, "group_size": None},
        {"bits": 4, "group_size": 32, "low_rank": LowRankConfig(rank=4)},
    ],
    ids=["w4", "w8", "low-rank"],
)
def test_transformers_refuses_the_shapes(tmp_path: Path, values: dict) -> None:
    hf_lowbit.quantize(llama(), RTNConfig(**values)).save_pretrained(tmp_path)
    message = stderr_of(TRANSFORMERS, tmp_path)
    assert "size mismatch" in message or "mismatched" in message, message


def test_diffusers_refuses_the_method(tmp_path: Path) -> None:
    hf_lowbit.quantize(unet(), RTNConfig(bits=4, group_size=32)).save_pretrained(tmp_path)
    assert "Unknown quantization type" in stderr_of(DIFFUSERS, tmp_path)


def test_float_checkpoints_still_load(tmp_path: Path) -> None:
    """The check itself: the same programs do load what is not quantized."""
    for model, load in ((llama(), TRANSFORMERS), (unet(), DIFFUSERS)):
        folder = tmp_path / type(model).__name__
        model.save_pretrained(folder)
        command = [sys.executable, "-c", WITHOUT.format(load=load), str(folder)]
        assert "loaded" in subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout
