"""Finished blocks are whole or absent, and another run's are never taken."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hf_lowbit.calibration.checkpoint import Checkpoint, ResumeError, fingerprint_of, unshared


def test_blocks_come_back_as_they_were(tmp_path: Path) -> None:
    saved = {"a": torch.arange(6, dtype=torch.int32).reshape(2, 3), "b": torch.randn(4).bfloat16()}
    first = Checkpoint(tmp_path / "run", "one")
    first.save("model.layers.0", saved, {"errors": {"a": 0.5}})
    second = Checkpoint(tmp_path / "run", "one")
    assert second.finished == 1 and second.load("model.layers.1") is None
    tensors, facts = second.load("model.layers.0") or ({}, {})
    assert facts == {"errors": {"a": 0.5}} and tensors.keys() == saved.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in saved.items())
    second.finish()
    assert not (tmp_path / "run").exists()


def test_half_a_file_is_no_block(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path, "one")
    checkpoint.save("block", {"a": torch.ones(1000)}, {})
    (path,) = tmp_path.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:100])
    assert checkpoint.load("block") is None and not list(tmp_path.glob("*.safetensors"))


def test_another_run_is_refused_and_kept(tmp_path: Path) -> None:
    Checkpoint(tmp_path, "one").save("block", {"a": torch.ones(2)}, {})
    with pytest.raises(ResumeError, match="resume=False"):
        Checkpoint(tmp_path, "two")
    assert Checkpoint(tmp_path, "one").finished == 1
    assert Checkpoint(tmp_path, "two", resume=False).finished == 0


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    for resume in (True, False):
        with pytest.raises(ResumeError, match="did not write"):
            Checkpoint(tmp_path, "one", resume)
    assert (tmp_path / "thesis.tex").read_text() == "mine"


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResumeError):
        Checkpoint(tmp_path / "file", "one")
    with pytest.raises(ResumeError, match="cannot be written"):
        Checkpoint(tmp_path / "file" / "below", "one")


def test_the_fingerprint_sees_every_bit() -> None:
    tensors = {"w": torch.zeros(3), "v": torch.ones(2, dtype=torch.int32)}
    one = fingerprint_of(tensors.items(), {"bits": 4})
    assert one == fingerprint_of(tensors.items(), {"bits": 4})
    assert one != fingerprint_of(tensors.items(), {"bits": 3})
    assert one != fingerprint_of({**tensors, "w": torch.tensor([0.0, -0.0, 0.0])}.items(), {"bits": 4})


def test_two_equal_runs_at_once_have_a_folder_each(tmp_path: Path) -> None:
    folder, lock = unshared(tmp_path / "resume" / "run")
    first = Checkpoint(folder, "one", lock=lock)
    own, none = unshared(tmp_path / "resume" / "run")
    second = Checkpoint(own, "one", lock=none)
    assert folder == tmp_path / "resume" / "run" and own != folder and none is None
    first.save("block", {"a": torch.ones(2)}, {})
    first.finish()
    second.save("block", {"a": torch.ones(2)}, {})
    second.finish()
    assert not list((tmp_path / "resume").iterdir())
    again, lock = unshared(tmp_path / "resume" / "run")
    assert again == folder and lock is not None
    lock.release()
