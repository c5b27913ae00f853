"""The library itself: present, on torch's threads, and done without where it cannot be."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from hf_lowbit.config import ConfigError
from hf_lowbit.kernels import cpu
from hf_lowbit.kernels.cpu import library
from hf_lowbit_rtn import RTNConfig


def test_is_built_and_loaded() -> None:
    assert cpu.available(), cpu.unavailable_because()
    assert cpu.instruction_sets()[-1] == "plain"


def test_an_instruction_set_that_is_not_there_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"'sve' does not run here; what does: .*plain"):
        cpu.use_instruction_set("sve")


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    import os

    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, **environment}
    )


def test_without_the_library_products_go_through_torch_and_it_is_said_once() -> None:
    code = """
import torch
from hf_lowbit.formats import WeightSpec
from hf_lowbit.rounding.nearest import round_to_nearest
from hf_lowbit.kernels import packed_linear, cpu
packed = round_to_nearest(torch.ones(4, 64), WeightSpec(bits=4))
for _ in range(3):
    y = packed_linear(torch.ones(2, 64), packed)
assert not cpu.available() and cpu.instruction_sets() == ()
print(y.shape)
"""
    result = run(code, HF_LOWBIT_NO_NATIVE="1")
    assert "torch.Size([2, 4])" in result.stdout
    assert result.stderr.count("native CPU kernels are not used: HF_LOWBIT_NO_NATIVE is set") == 1


def test_a_library_that_cannot_be_loaded_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "_lowbit.so").write_bytes(b"not a library")
    monkeypatch.setattr(library, "_FOLDER", tmp_path)
    monkeypatch.setattr(library, "_reason", None)
    library.load.cache_clear()
    try:
        assert not cpu.available()
        assert "cannot be loaded" in (cpu.unavailable_because() or "")
        with pytest.raises(ConfigError, match=r"backend 'cpu' does not run here .*'reference' does"):
            RTNConfig(bits=4, backend="cpu")
    finally:
        library.load.cache_clear()


def test_a_backend_that_does_not_exist_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"backend 'gpu' does not exist; there are: reference, cpu"):
        RTNConfig(bits=4, backend="gpu")


def test_works_on_torchs_own_threads() -> None:
    """A product on two threads starts none: the pool torch already has does the work."""
    from hf_lowbit.formats import WeightSpec
    from hf_lowbit.rounding.nearest import round_to_nearest

    packed = round_to_nearest(torch.randn(512, 1024, generator=torch.Generator().manual_seed(0)), WeightSpec(bits=8))
    matrix = cpu.describe(packed)
    assert matrix is not None
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        torch.randn(512, 512) @ torch.randn(512, 512)
        torch.randn(1 << 20).sin()
        threads = _thread_count()
        for _ in range(20):
            cpu.linear(torch.ones(1, 1024), [matrix])
        assert _thread_count() == threads
    finally:
        torch.set_num_threads(before)


def test_many_callers_at_once() -> None:
    from hf_lowbit.formats import WeightSpec
    from hf_lowbit.rounding.nearest import round_to_nearest

    packed = round_to_nearest(torch.randn(300, 512, generator=torch.Generator().manual_seed(0)), WeightSpec(bits=4))
    matrix = cpu.describe(packed)
    assert matrix is not None
    x = torch.randn(4, 512, generator=torch.Generator().manual_seed(1))
    expected = cpu.linear(x, [matrix])[0]
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(50):
            if not torch.equal(cpu.linear(x, [matrix])[0], expected):
                wrong.append(number)

    callers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


def _thread_count() -> int:
    return len(list(Path("/proc/self/task").iterdir()))
