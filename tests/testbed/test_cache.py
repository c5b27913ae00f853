"""Cached folders: complete or absent, and built by one process only."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hf_lowbit.testbed import cache, cache_home, read_source

SOURCE = {"name": "thing", "license": "mit"}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_LOWBIT_HOME", str(tmp_path))
    return tmp_path / "testbed"


def build(folder: Path) -> dict[str, Any]:
    assert not list(folder.iterdir())
    (folder / "weights").write_bytes(b"1234")
    return SOURCE


def refuse(folder: Path) -> dict[str, Any]:
    raise AssertionError("built again")


def contents(home: Path) -> set[str]:
    return {path.name for path in home.iterdir()} - {"thing.lock"}


def test_home_follows_the_environment(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_home() == home
    monkeypatch.delenv("HF_LOWBIT_HOME")
    assert cache_home() == Path.home() / ".cache/hf_lowbit/testbed"


def test_a_folder_is_built_once(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = cache.cached_folder("thing", build)
    assert folder == home / "thing"
    assert (folder / "weights").read_bytes() == b"1234"
    assert read_source(folder) == SOURCE
    assert "thing: ready" in capsys.readouterr().err
    assert cache.cached_folder("thing", refuse) == folder
    assert capsys.readouterr().err == ""
    assert contents(home) == {"thing"}


def test_a_failed_build_leaves_nothing(home: Path) -> None:
    def fail(folder: Path) -> dict[str, Any]:
        (folder / "weights").write_bytes(b"12")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        cache.cached_folder("thing", fail)
    assert contents(home) == set()
    cache.cached_folder("thing", build)


def test_a_killed_build_is_no_folder_and_is_cleared_away(home: Path) -> None:
    script = (
        "import os, signal\n"
        "from hf_lowbit.testbed.cache import cached_folder\n"
        "def build(folder):\n"
        "    (folder / 'weights').write_bytes(b'12')\n"
        "    (folder / 'config.json').write_text('{}')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "cached_folder('thing', build)\n"
    )
    checkout = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", script], cwd=checkout, env={**os.environ, "PYTHONPATH": str(checkout)})
    assert done.returncode < 0
    assert len(contents(home)) == 1  # what was killed, under a name that nobody takes for the folder
    assert not (home / "thing").exists()

    assert (cache.cached_folder("thing", build) / "weights").read_bytes() == b"1234"
    assert contents(home) == {"thing"}


def test_a_folder_of_another_origin_is_replaced(home: Path) -> None:
    (home / "thing").mkdir(parents=True)
    (home / "thing" / "config.json").write_text("{}")
    folder = cache.cached_folder("thing", build)
    assert {path.name for path in folder.iterdir()} == {"weights", "source.json"}


def test_two_processes_build_once(home: Path) -> None:
    script = (
        "import time\n"
        "from hf_lowbit.testbed.cache import cached_folder, cache_home\n"
        "def build(folder):\n"
        "    with open(cache_home() / 'builds', 'a') as file: file.write('x')\n"
        "    time.sleep(1)\n"
        "    return {}\n"
        "cached_folder('thing', build)\n"
    )
    checkout = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    processes = [subprocess.Popen([sys.executable, "-c", script], cwd=checkout, env=environment) for _ in range(2)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    assert (home / "builds").read_text() == "x"


def test_a_folder_without_a_source_is_not_ours(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_source(tmp_path)
