"""The folder a result goes to: checked before the work starts, complete when it ends."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

from torch import nn

from hf_lowbit.config import LowbitConfig
from hf_lowbit.integrations.loading import read_json
from hf_lowbit.method import methods
from hf_lowbit.plain import save
from hf_lowbit.reporting import REPORT_FILE

logger = logging.getLogger("hf_lowbit")

_PROCESSING_FILES = ("tokenizer_config.json", "preprocessor_config.json", "processor_config.json")


def prepare_output(folder: Path, config: LowbitConfig, source: str | None, resume: bool) -> bool:
    """Check an output folder.

    Returns:
        True if it already holds the finished result of this source and config, and ``resume`` allows to take it.

    Raises:
        NotADirectoryError: it is a file.
        FileExistsError: it holds something that hf_lowbit did not write, or another result while ``resume`` is on.
        PermissionError: it cannot be written.
    """
    existing = folder
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise NotADirectoryError(f"{existing} is a file; the result needs a folder")
    for place in (existing, folder.absolute().parent):  # the result is made beside the folder and moved
        if place.exists() and not os.access(place, os.W_OK):
            raise PermissionError(f"{place} cannot be written")
    if not folder.exists() or not any(folder.iterdir()):
        return False
    if not (folder / REPORT_FILE).exists() and not list(folder.glob(f"*/{REPORT_FILE}")):
        raise FileExistsError(f"{folder} holds files that hf_lowbit did not write; name a new or empty folder")
    if not resume:
        return False
    if _is_finished(folder, config, source):
        return True
    raise FileExistsError(
        f"{folder} holds the result of another run; name another folder, or pass resume=False to replace it"
    )


def resume_folder(output: str | Path | None) -> Path | None:
    """Where a calibrated run that writes to ``output`` keeps its finished blocks: a hidden folder beside it."""
    if output is None:
        return None
    folder = Path(output).absolute()
    return folder.parent / f".{folder.name}.lowbit-resume"


def save_complete(result: Any, output: Path, source: str | None) -> None:
    """Save a result with the tokenizer or processor of its source, so that the folder can be used alone."""
    if hasattr(result, "save_pretrained"):
        result.save_pretrained(output)
        if source is not None and isinstance(result, nn.Module):
            _copy_processing(source, output)
    else:
        save(result, output)


def _copy_processing(source: str, output: Path) -> None:
    """Tokenizer, processor or feature extractor of the source, where it has one."""
    if all(read_json(source, name) is None for name in _PROCESSING_FILES):
        return
    from transformers import AutoProcessor, AutoTokenizer

    for loader in (AutoProcessor, AutoTokenizer):
        try:
            loader.from_pretrained(source).save_pretrained(output)
            return
        except (OSError, ValueError, ImportError, KeyError) as error:
            logger.debug("%s does not load from %s: %s", loader.__name__, source, error)
    logger.warning("the tokenizer of %s could not be loaded, so that %s has none", source, output)


def stored_config(folder: Path) -> LowbitConfig | None:
    """The quantization config of a saved model, or None if there is none that can be read."""
    for path in (folder / "config.json", folder / "lowbit_config.json"):
        try:
            values = json.loads(path.read_text())["quantization_config"]
            method = methods()[values["quant_method"].removeprefix("lowbit_")]
            config: LowbitConfig = method.config_class.from_dict(values)
            return config
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    return None


def _is_finished(folder: Path, config: LowbitConfig, source: str | None) -> bool:
    found = [
        stored_config(path.parent) for path in (folder / REPORT_FILE, *folder.glob(f"*/{REPORT_FILE}")) if path.exists()
    ]
    return bool(found) and all(
        stored is not None and stored.same_request(config) and source is not None
        and stored.provenance.get("source") == source
        and stored.provenance.get("request") == config.provenance.get("request")
        for stored in found
    )  # fmt: skip
