"""What is quantized, calibrated on and judged, the same for every variant."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Task:
    """One model with its data.

    Attributes:
        data: a file of torch: token ids ``[samples, length]``, or a list of recordings at 16 kHz.
        windows: held-out token ids, ``[n]`` each, no two alike.
        load: a folder -> the model, in float32.
        read: a model -> the function from ids ``[1, n]`` of a window to logits ``[1, n, vocabulary]``.
        clusters: windows whose number here is the same overlap, and count as one for intervals; None: none do.
        fields: of every config of ours.
    """

    model: Path
    data: Path
    windows: list[Tensor]
    load: Callable[[Path], Any]
    read: Callable[[Any], Callable[[Tensor], Tensor]]
    clusters: list[int] | None = None
    fields: dict[str, Any] = field(default_factory=dict)
