"""export_model(): a quantized model as a folder of another format."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from hf_lowbit.export.compressed_tensors import write
from hf_lowbit.export.config import quantization_config
from hf_lowbit.export.model import check_model
from hf_lowbit.export.scheme import ExportError
from hf_lowbit.export.vllm import obstacles
from hf_lowbit.integrations.atomic import write_folder
from hf_lowbit.integrations.loading import load_quantized
from hf_lowbit.suggestion import unknown

logger = logging.getLogger("hf_lowbit")

FORMATS = ("compressed-tensors",)


@dataclass(frozen=True)
class Exported:
    """What an export wrote.

    Attributes:
        output: the folder.
        format: the format's name.
        storage: how the format stores the weights: "pack-quantized", "int-quantized" or "mixed-precision".
        layers: quantized modules; fused experts count as one.
        groups: config groups, one per distinct scheme.
        bytes: size of the folder.
        vllm: why vLLM, as far as its sources tell, would not load the folder or needs a recent version; it was not
            tried.
    """

    output: Path
    format: str
    storage: str
    layers: int
    groups: int
    bytes: int
    vllm: tuple[str, ...]


def export_model(model: nn.Module | str | Path, output: str | Path, to: str = "compressed-tensors") -> Exported:
    """Write a quantized transformers model in a format that plain transformers (checked) and vLLM (not tried) read.

    The weights that a reader decodes are bit-equal to ``module.dequantized(dtype=model.dtype)``. Layers with 8-bit
    inputs differ in one thing: transformers' emulation of the format maps a token's largest value to 127.5, vLLM and
    hf_lowbit to 127.

    Args:
        model: a quantized transformers model, which stays as it is, or the folder or repository of one. With the
            latter, the tokenizer or processor is copied too.
        output: a new or empty folder. It appears when it is complete.
        to: "compressed-tensors" (integers of 2 to 8 bits, or int8 weights with 8-bit inputs).

    Raises:
        ExportError: the format cannot hold the model, or its readers cannot load it; nothing has been written then.
        FileExistsError, NotADirectoryError: the output is in the way.
    """
    if to not in FORMATS:
        raise ExportError(unknown("export format", to, FORMATS))
    _check_output(Path(output))
    source = None if isinstance(model, nn.Module) else str(model)
    loaded: Any = model if isinstance(model, nn.Module) else load_quantized(model)
    schemes = check_model(loaded)
    config = quantization_config(loaded, schemes)
    write_folder(output, lambda staged: write(loaded, schemes, config, staged, source))
    notes = tuple(obstacles(loaded, schemes))
    for note in notes:
        logger.warning("vLLM: %s", note)
    size = sum(path.stat().st_size for path in Path(output).rglob("*") if path.is_file())
    groups = len(config["config_groups"])
    return Exported(Path(output), to, config["format"], len(schemes), groups, size, notes)


def _check_output(folder: Path) -> None:
    if folder.is_file():
        raise NotADirectoryError(f"{folder} is a file; the result needs a folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty; name a new or empty folder")
