"""Scores of a model on held-out windows against the float model, whose logits are computed once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_lowbit.evaluation.bootstrap import bootstrap_interval
from hf_lowbit.evaluation.scores import WindowScores, score_windows
from quality.task import Task


class Judge:
    """Holds the float model's logits of all windows in a file."""

    def __init__(self, task: Task, model: Any, folder: Path) -> None:
        self._task = task
        rows = sum(window.numel() for window in task.windows)
        self._logits = np.memmap(folder / "logits.f32", np.float32, "w+", shape=(rows, model.config.vocab_size))
        self._start: dict[int, int] = {}
        start, read = 0, task.read(model)
        with torch.no_grad():
            for window in task.windows:
                logits = read(window[None])[0].float().cpu().numpy()
                self._logits[start : start + len(logits)] = logits
                self._start[_key(window)] = start
                start += len(logits)

    def reference(self, ids: Tensor) -> Tensor:
        """The float model's logits ``[1, n, vocabulary]`` of a window."""
        start = self._start[_key(ids[0])]
        return torch.from_numpy(self._logits[start : start + ids.shape[1]])[None]

    def score(self, model: Any) -> WindowScores:
        """Sums per window, or per cluster of them."""
        scores = score_windows(self._task.read(model), self._task.windows, self.reference)
        return scores if self._task.clusters is None else _clustered(scores, self._task.clusters)


def _clustered(scores: WindowScores, clusters: list[int]) -> WindowScores:
    together = WindowScores()
    for cluster in dict.fromkeys(clusters):
        of = [index for index, each in enumerate(clusters) if each == cluster]
        sums = {name: sum(values[index] for index in of) for name, values in scores.sums.items()}
        together.add(sum(scores.tokens[index] for index in of), sums)
    return together


def _key(window: Tensor) -> int:
    return hash(tuple(window.tolist()))


def summary(scores: WindowScores) -> dict[str, Any]:
    """Perplexity and KL with intervals, and the sums they are made of."""
    from hf_lowbit.evaluation.language import summarize

    return {**summarize(scores), "window_tokens": scores.tokens, "window_kl": scores.sums["kl"]}


def difference(one: dict[str, Any], other: dict[str, Any]) -> tuple[float, float, float]:
    """KL of one minus KL of the other, nats per token, with its paired 95 % interval over windows."""
    sums = [a - b for a, b in zip(one["window_kl"], other["window_kl"], strict=True)]
    tokens = one["window_tokens"]
    low, high = bootstrap_interval(sums, tokens)
    return sum(sums) / sum(tokens), low, high
