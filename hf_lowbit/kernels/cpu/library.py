"""Finding and opening the native library, and giving it torch's thread pool."""

from __future__ import annotations

import ctypes
import logging
import os
from functools import cache
from pathlib import Path

import torch

logger = logging.getLogger("hf_lowbit")

_FOLDER = Path(__file__).parent
_DISABLE = "HF_LOWBIT_NO_NATIVE"
_ABI_SYMBOLS = ("hfl_linear", "hfl_linear_int8", "hfl_decode", "hfl_read", "hfl_use", "hfl_instruction_sets")


@cache
def load() -> ctypes.CDLL | None:
    """The library, or None where it was not built, cannot be opened, or ``HF_LOWBIT_NO_NATIVE`` is set: said once."""
    if os.environ.get(_DISABLE):
        return _without(f"{_DISABLE} is set")
    paths = sorted(_FOLDER.glob("_lowbit.*so")) + sorted(_FOLDER.glob("_lowbit*.pyd"))
    if not paths:
        return _without("it was not built; reinstall hf_lowbit where a C++17 compiler is found")
    try:
        library = ctypes.CDLL(str(paths[0]))
        for symbol in _ABI_SYMBOLS:
            getattr(library, symbol)
    except (OSError, AttributeError) as error:
        return _without(f"{paths[0].name} cannot be loaded: {error}")
    library.hfl_instruction_sets.restype = ctypes.c_char_p
    library.hfl_read.restype = ctypes.c_uint64
    if runner := _torch_runner():
        library.hfl_set_runner(runner)
    else:
        logger.warning("torch's OpenMP pool was not found: hf_lowbit's CPU kernels use one thread")
    return library


def available() -> bool:
    """Whether the native kernels run here."""
    return load() is not None


def unavailable_because() -> str | None:
    """Why they do not, or None."""
    load()
    return _reason


def instruction_sets() -> tuple[str, ...]:
    """Those of the library that this processor runs, best first; empty without the library."""
    library = load()
    return () if library is None else tuple(library.hfl_instruction_sets().decode().split(","))


def use_instruction_set(name: str | None) -> None:
    """Force one of :func:`instruction_sets` for the whole process; None returns to the best.

    Raises:
        ValueError: this processor or this build lacks it.
    """
    library = load()
    if library is None or library.hfl_use(None if name is None else name.encode()):
        known = ", ".join(instruction_sets()) or f"none ({unavailable_because()})"
        raise ValueError(f"instruction set {name!r} does not run here; what does: {known}")


_reason: str | None = None


def _without(reason: str) -> None:
    global _reason
    _reason = reason
    logger.warning("hf_lowbit's native CPU kernels are not used: %s. Products go through torch, slower.", reason)


def _torch_runner() -> ctypes.c_void_p | None:
    """``GOMP_parallel`` of the OpenMP library torch has loaded, so that there is one pool of threads, not two.

    torch opens its dependencies globally, so the symbol is found without naming a file; else it is looked for in the
    library files beside torch.
    """
    folder = Path(torch.__file__).parent / "lib"
    candidates: list[str | None] = [None, *map(str, sorted(folder.glob("libgomp*")) + sorted(folder.glob("libiomp5*")))]
    for candidate in candidates:
        try:
            return ctypes.cast(ctypes.CDLL(candidate).GOMP_parallel, ctypes.c_void_p)
        except (OSError, AttributeError):
            continue
    return None
