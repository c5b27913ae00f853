"""The instruction sets that the native kernels are tested on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hf_lowbit.kernels import cpu


@pytest.fixture(params=cpu.instruction_sets() or ["none"])
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set of the library that this processor runs, forced."""
    assert cpu.available(), cpu.unavailable_because()
    cpu.use_instruction_set(request.param)
    yield request.param
    cpu.use_instruction_set(None)
