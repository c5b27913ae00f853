"""The Hub as a source: taken where it answers, given up quickly where it does not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, HfApi, constants

from hf_lowbit.testbed import FetchError
from hf_lowbit.testbed.hub import download_from_hub
from tests.hub.fixture import Hub

CHECKOUT = Path(__file__).resolve().parents[2]


def test_offline_mode_does_not_ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(HfApi, "model_info", lambda *_, **__: pytest.fail("the Hub was asked"))
    with pytest.raises(FetchError, match="HF_HUB_OFFLINE"):
        download_from_hub("org/model", tmp_path)


def test_a_download_that_breaks_off_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Info:
        sha = "0" * 40

    def break_off(repo_id: str, local_dir: Path, **_: object) -> None:
        (local_dir / "config.json").write_text("{}")
        (local_dir / ".cache").mkdir()
        raise ConnectionError("reset")

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.is_offline_mode", lambda: False)
    monkeypatch.setattr(HfApi, "model_info", lambda *_, **__: Info())
    monkeypatch.setattr("huggingface_hub.snapshot_download", break_off)
    with pytest.raises(FetchError, match="ConnectionError: reset"):
        download_from_hub("org/model", tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_repository_comes_with_its_commit_and_licence(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    api = HfApi(endpoint=hub.url, token=hub.token)
    repo_id = api.create_repo("tester/testbed-model").repo_id
    files = {
        "config.json": b"{}",
        "model.safetensors": b"weights",
        "model.onnx": b"not wanted",
        "README.md": b"---\nlicense: apache-2.0\n---\n# Card\n",
    }
    operations = [CommitOperationAdd(name, data) for name, data in files.items()]
    commit = api.create_commit(repo_id, operations, commit_message="files")

    script = (
        "import json, pathlib, sys\n"
        "from hf_lowbit.testbed.hub import download_from_hub\n"
        "print(json.dumps(download_from_hub(sys.argv[1], pathlib.Path(sys.argv[2]))))\n"
    )
    (tmp_path / "model").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", script, repo_id, str(tmp_path / "model")],
        env={**os.environ, **hub.env, "PYTHONPATH": str(CHECKOUT)},
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert commit.oid in done.stdout
    assert {path.name for path in (tmp_path / "model").iterdir()} == {"config.json", "model.safetensors"}
