"""The function behind Triton's launcher is found by asking the launcher, of whatever version."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hf_lowbit.kernels.triton.compiled import _direct

GRID, STREAM = (3, 2, 1), 5


class Launcher:
    """What it was asked to launch is noted by what stands in for a function in C."""

    def __init__(self) -> None:
        self.launched: list[tuple[Any, ...]] = []
        self.launch = self._note

    def _note(self, *given: Any) -> None:
        self.launched.append(given)

    def __call__(self, *given: Any) -> None:
        self.launch(*given)


class WithFlags(Launcher):
    def __call__(self, x: int, y: int, z: int, stream: int, function: int, *rest: Any) -> None:
        self.launch(x, y, z, stream, function, False, None, *rest)


class WithScratch(Launcher):
    def __call__(self, x: int, y: int, z: int, stream: int, function: int, *rest: Any) -> None:
        self.launch(x, y, z, stream, function, torch.empty(1), *rest)


class Another:
    def __init__(self) -> None:
        self.launched: list[tuple[Any, ...]] = []

    def __call__(self, *given: Any) -> None:
        self.launched.append(given)


@pytest.mark.parametrize(
    ("kind", "found"), ((Launcher, True), (WithFlags, True), (WithScratch, False), (Another, False))
)
def test_it_launches_what_the_launcher_would(kind: Any, found: bool) -> None:
    launcher = kind()
    compiled = SimpleNamespace(run=launcher, function=7, packed_metadata=(1, 2))
    run, grid, loaded = _direct(compiled, GRID)
    assert launcher.launched == [] and (run is not launcher) == found
    run(*grid, STREAM, *loaded, "x")
    launcher(*GRID, STREAM, 7, (1, 2), None, None, None, "x")
    directly, usually = launcher.launched
    assert directly[:5] == usually[:5] == (*GRID, STREAM, 7) and directly[-1] == usually[-1] == "x"
    assert len(directly) == len(usually) and (not found or directly == usually)
