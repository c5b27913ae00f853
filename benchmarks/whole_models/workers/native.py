"""Which build of hf_lowbit's kernels a worker ran: without any, a number would be that of the torch fallback."""

from __future__ import annotations

import hashlib
from pathlib import Path


def native_library() -> str:
    """Its SHA-256, the first 12 digits. Raises RuntimeError where products would go through torch."""
    from hf_lowbit.kernels import cpu

    if not cpu.available():
        raise RuntimeError(f"hf_lowbit's native kernels are absent: {cpu.unavailable_because()}")
    digest = hashlib.sha256()
    for path in sorted(Path(cpu.__file__).parent.glob("_lowbit*.so")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
