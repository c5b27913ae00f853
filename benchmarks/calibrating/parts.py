"""Where the time of a block goes."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch


class Parts:
    """Seconds of a block's parts, measured with the card idle at both ends of each."""

    def __enter__(self) -> Parts:
        from hf_lowbit.calibration import block, walk
        from hf_lowbit.calibration.progress import Progress
        from hf_lowbit.calibration.statistics import Hessian
        from hf_lowbit.rounding import feedback, gptq

        self.blocks: list[dict[str, float]] = []
        self._seconds: dict[str, float] = defaultdict(float)
        self._begun, step = time.monotonic(), Progress.step

        def finished(progress: Progress, *args: Any) -> None:
            step(progress, *args)
            torch.cuda.synchronize()
            now = time.monotonic()
            total, inner = now - self._begun, dict(self._seconds)
            inner["forward for statistics"] -= inner.get("Hessian sums", 0)
            self.blocks.append({**inner, "other": total - sum(inner.values()), "total": total})
            self._begun, self._seconds = now, defaultdict(float)

        self._patches = ExitStack()
        for owner, name, what in (
            (block.Block, "gather", "forward for statistics"),
            (Hessian, "update", "Hessian sums"),
            (feedback, "inverse_factor", "Cholesky"),
            (gptq, "round_columns", "rounding loop"),
            (gptq, "to_packed", "packing"),
            (walk, "advance", "forward to the next block"),
        ):
            self._patches.enter_context(patch.object(owner, name, self._timed(what, getattr(owner, name))))
        self._patches.enter_context(patch.object(Progress, "step", finished))
        return self

    def __exit__(self, *error: object) -> None:
        self._patches.close()

    def _timed(self, what: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            torch.cuda.synchronize()
            begun = time.monotonic()
            result = function(*args, **kwargs)
            torch.cuda.synchronize()
            self._seconds[what] += time.monotonic() - begun
            return result

        return timed
