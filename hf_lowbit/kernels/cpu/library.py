"""Finding and opening the native library, and giving it torch's thread pool."""

from __future__ import annotations

import ctypes
import logging
import os
from functools import cache
from pathlib import Path
from typing import Any

import torch

from hf_lowbit.kernels.cpu.heap import keep_freed_memory

logger = logging.getLogger("hf_lowbit")

_FOLDER = Path(__file__).parent
_DISABLE = "HF_LOWBIT_NO_NATIVE"
_POINTER, _INT, _LONG = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
# Of lowbit.h: result, then arguments.
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "hfl_set_runner": (None, _POINTER),
    "hfl_instruction_sets": (ctypes.c_char_p,),
    "hfl_use": (_INT, ctypes.c_char_p),
    "hfl_linear": (_INT, _POINTER, _INT, _POINTER, _INT, _LONG, _LONG, _POINTER, _INT),
    "hfl_linear_int8": (_INT, _POINTER, _INT, _POINTER, _POINTER, _LONG, _LONG, _INT, _POINTER, _INT),
    "hfl_quantize": (_INT, _POINTER, _INT, _LONG, _LONG, _LONG, _INT, _POINTER, _POINTER),
    "hfl_multiplies_int8": (_INT, _POINTER),
    "hfl_multiplies_in_registers": (_INT, _POINTER),
    "hfl_multiplies_many": (_INT, _POINTER, _INT),
    "hfl_decode": (_INT, _POINTER, _POINTER, _LONG, _LONG, _POINTER, _INT, _INT),
    "hfl_selective_scan": (_INT, ctypes.c_char_p, _INT),
    "hfl_causal_convolution": (_INT, ctypes.c_char_p, _INT),
    "hfl_rounding_errors": (_INT, ctypes.c_char_p, _INT),
    "hfl_register_operators": (_INT, _POINTER),
    "hfl_know": (None, _POINTER, _POINTER, _INT, ctypes.c_char_p, _POINTER, ctypes.c_char_p, _INT, _LONG),
    "hfl_forget": (None, _LONG),
    "hfl_read": (ctypes.c_uint64, _POINTER, _LONG, _INT),
}


@cache
def load() -> ctypes.CDLL | None:
    """The library, or None where it was not built, cannot be opened, or ``HF_LOWBIT_NO_NATIVE`` is set: said once."""
    if os.environ.get(_DISABLE):
        _do_without(f"{_DISABLE} is set")
        return None
    paths = sorted(_FOLDER.glob("_lowbit.*so")) + sorted(_FOLDER.glob("_lowbit*.pyd"))
    if not paths:
        _do_without("it was not built; reinstall hf_lowbit where a C++17 compiler is found")
        return None
    try:
        library = ctypes.CDLL(str(paths[0]))
        for symbol in _SIGNATURES:
            getattr(library, symbol)
    except (OSError, AttributeError) as error:
        _do_without(f"{paths[0].name} cannot be loaded: {error}")
        return None
    for name, (result, *arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    keep_freed_memory()
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
    global _forced
    library = load()
    if library is None or library.hfl_use(None if name is None else name.encode()):
        known = ", ".join(instruction_sets()) or f"none ({unavailable_because()})"
        raise ValueError(f"instruction set {name!r} does not run here; what does: {known}")
    _forced = name


def instruction_set() -> str | None:
    """The one in use; None without the library."""
    return _forced or next(iter(instruction_sets()), None)


_reason: str | None = None
_forced: str | None = None


def _do_without(reason: str) -> None:
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
