"""Starts the test Hub in a process of its own, and hands it to tests as the fixture ``hub``."""

import http.client
import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
START_SECONDS = 30
CLIENT_PREFIXES = ("HF_", "HUGGING", "TRANSFORMERS_", "DIFFUSERS_")


@dataclass(frozen=True)
class Hub:
    """A running Hub: its address, a token that may write, and the folder it keeps everything in."""

    url: str
    token: str
    root: Path

    @property
    def env(self) -> dict[str, str]:
        """Environment variables that point a client at this Hub; set them before huggingface_hub is imported."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": self.token,
            "HF_HOME": str(self.root / "client"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
        }

    def requests(self) -> list[str]:
        """All requests so far, oldest first, each as ``METHOD path``."""
        log = self.root / "requests.log"
        return log.read_text().splitlines() if log.exists() else []

    def python(self, script: str, *args: str, **env: str) -> str:
        """Runs Python code in a new process that is a client of this Hub with an empty cache; returns its output."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(CLIENT_PREFIXES)}
        with tempfile.TemporaryDirectory(prefix="hf_home_") as home:
            done = subprocess.run(
                [sys.executable, "-c", script, *args],
                env=inherited | self.env | {"HF_HOME": home} | env,
                cwd=CHECKOUT,
                capture_output=True,
                text=True,
            )
        assert done.returncode == 0, f"client failed\n{done.stdout}\n{done.stderr}"
        return done.stdout


@contextmanager
def running_hub(root: Path) -> Iterator[Hub]:
    """Runs a Hub on a free port; repositories that an earlier Hub left under ``root`` are there again."""
    root.mkdir(parents=True, exist_ok=True)
    token = f"hf_{secrets.token_hex(16)}"
    command = [sys.executable, "-m", "tests.hub.server", "--root", str(root), "--port", "0", "--token", token]
    with open(root / "server.out", "wb") as out, open(root / "server.err", "wb") as err:
        process = subprocess.Popen(
            [*command, "--until-eof"], cwd=CHECKOUT, stdin=subprocess.PIPE, stdout=out, stderr=err
        )
    try:
        yield Hub(_wait_for_url(process, root), token, root)
    finally:
        try:
            process.communicate(timeout=10)  # closes its input: it stops then, as it does when this process dies
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_for_url(process: subprocess.Popen, root: Path) -> str:
    """Reads the address that the server prints, and waits until it answers there."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        line = (root / "server.out").read_text()
        if line.endswith("\n"):
            url = json.loads(line)["url"]
            if _answers(url):
                return url
        time.sleep(0.02)
    raise RuntimeError(f"the test Hub did not start: {(root / 'server.err').read_text()}")


def _answers(url: str) -> bool:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=5)
    try:
        connection.request("GET", "/")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


@pytest.fixture(scope="session")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """One Hub for the whole test session: give every test a repository name of its own."""
    with running_hub(tmp_path_factory.mktemp("hub")) as running:
        yield running
