"""Importing hf_lowbit registers every method, in whatever order the libraries are imported, and is quick."""

from __future__ import annotations

import subprocess
import sys

import pytest

ORDERS = {
    "before transformers": "import hf_lowbit; import transformers.quantizers.auto",
    "after transformers": "import transformers.quantizers.auto; import hf_lowbit",
    "through a model class": "import hf_lowbit; from transformers import AutoModelForCausalLM",
    "engine first": "import hf_lowbit; hf_lowbit.quantize; import transformers.quantizers.auto",
    "before diffusers": "import hf_lowbit; from diffusers import DiffusionPipeline, UNet2DModel",
    "after diffusers": "from diffusers import UNet2DModel; import hf_lowbit",
    "before peft": "import hf_lowbit; import peft",
    "after peft": "import peft; import hf_lowbit",
    "twice": "import hf_lowbit, importlib; importlib.reload(hf_lowbit); import diffusers.quantizers.auto",
}

_CHECK = """
import sys, transformers.quantizers.auto as t
assert "lowbit_rtn" in t.AUTO_QUANTIZER_MAPPING and "lowbit_rtn" in t.AUTO_QUANTIZATION_CONFIG_MAPPING
if "diffusers" in sys.modules:
    import diffusers.quantizers.auto as d
    assert "lowbit_rtn" in d.AUTO_QUANTIZER_MAPPING and "lowbit_rtn" in d.AUTO_QUANTIZATION_CONFIG_MAPPING
"""


def _python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


@pytest.mark.parametrize("order", ORDERS)
def test_every_import_order_registers(order: str) -> None:
    _python(f"{ORDERS[order]}\n{_CHECK}")


def test_importing_loads_no_algorithm_and_compiles_nothing() -> None:
    loaded = _python("import hf_lowbit, sys; hf_lowbit.methods(); print(*sys.modules)").split()
    assert "hf_lowbit_rtn.config" in loaded
    heavy = {"hf_lowbit_rtn.recipe", "hf_lowbit.rounding", "diffusers", "peft", "torch._inductor", "triton"}
    assert not heavy & set(loaded)


def test_every_public_name_is_there() -> None:
    names = "RTNConfig LowRankConfig LowbitConfig quantize save load report push_to_hub prepare_for_training methods"
    _python("import hf_lowbit\n" + "\n".join(f"assert callable(hf_lowbit.{name})" for name in names.split()))
