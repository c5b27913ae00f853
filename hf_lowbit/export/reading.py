"""Whether plain transformers loads a written folder: asked of the installed version."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hf_lowbit.export.scheme import ExportError


def check_loads(model: Any, folder: Path) -> None:
    """Load the folder on the meta device, where every tensor has its name and shape but no memory.

    This finds what depends on the architecture, such as a model that initialises the very weight which is packed.
    Older versions decode while they load, which needs values: what fails is loaded in earnest before it is refused.

    Raises:
        ExportError: loading fails, or tensors are missing, left over or of a wrong shape.
    """
    if _problem(model, folder, "meta") and (problem := _problem(model, folder, "cpu")):
        raise ExportError(f"the installed transformers does not load {type(model).__name__} so exported: {problem}")


def _problem(model: Any, folder: Path, device: str) -> str:
    try:
        with _quiet():
            _, info = type(model).from_pretrained(folder, device_map=device, output_loading_info=True)
    except Exception as error:  # whatever a library raises while it loads
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return "; ".join(f"{key}: {', '.join(sorted(map(str, value))[:3])}" for key, value in info.items() if value)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' table of the problems: they are raised."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(before)
