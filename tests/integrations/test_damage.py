"""Damaged, incomplete and edited checkpoints are refused by name; a crash while saving leaves nothing half done."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import hf_lowbit
from hf_lowbit.integrations import atomic
from tests.matrix.models import MODELS, fingerprint

LLAMA = MODELS["llama"]
SCALE = "model.layers.1.mlp.up_proj.weight_scale"
WEIGHT = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed checkpoint in one file."""
    source = LLAMA.create(tmp_path_factory.mktemp("float") / "llama")
    folder = tmp_path_factory.mktemp("packed") / "llama"
    LLAMA.load(source, quantization_config=hf_lowbit.RTNConfig(bits=4, group_size=32)).save_pretrained(folder)
    return folder


@pytest.fixture
def damaged(saved: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(saved, tmp_path / "damaged"))


def _edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _edit_config(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    edit(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


def test_a_scale_that_is_not_finite(damaged: Path) -> None:
    _edit_tensors(damaged, lambda t: t[SCALE].view(torch.bfloat16)[0].fill_(float("nan")))
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj: weight_scale holds NaN"):
        LLAMA.load(damaged)


def test_a_missing_companion(damaged: Path) -> None:
    _edit_tensors(damaged, lambda t: t.pop(SCALE))
    with pytest.raises(ValueError, match=r"lacks 1 tensors.*up_proj.weight_scale"):
        LLAMA.load(damaged)


def test_a_missing_weight(damaged: Path) -> None:
    _edit_tensors(damaged, lambda t: t.pop(WEIGHT))
    with pytest.raises(ValueError, match=r"lacks 1 tensors.*up_proj.weight"):
        LLAMA.load(damaged)


def test_a_packed_tensor_of_a_wrong_shape(damaged: Path) -> None:
    _edit_tensors(damaged, lambda t: t.update({WEIGHT: t[WEIGHT][:, :-1].contiguous()}))
    with pytest.raises((ValueError, RuntimeError), match=r"mismatch|up_proj"):
        LLAMA.load(damaged)


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.99])
def test_a_truncated_file(damaged: Path, keep: float) -> None:
    path = damaged / "model.safetensors"
    os.truncate(path, int(path.stat().st_size * keep))
    with pytest.raises(Exception, match=r"(?i)incomplete|header|invalid|deserializ"):
        LLAMA.load(damaged)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda q: q["plan"][0]["weight"].update(bits=3), "mismatch|plan says|up_proj"),
        (lambda q: q["plan"][0]["weight"].update(bits=9), "bits"),
        (lambda q: q["plan"][0]["weight"].update(group_size=16), "mismatch|plan says"),
        (lambda q: q["plan"][0]["weight"].update(format="int7"), "unknown number format"),
        (lambda q: q["plan"][0].update(kind="os.system"), "unknown kind"),
        (lambda q: q["plan"][0]["modules"].append("model.layers.7.mlp.up_proj"), "does not have"),
        (lambda q: q.update(plan=None), "no plan"),
        (lambda q: q.update(surprise=1), "no field surprise"),
        (lambda q: q.update(format_version=99), "upgrade hf_lowbit"),
    ],
    ids=["bits", "bits-range", "group", "table", "kind", "module", "no-plan", "field", "version"],
)
def test_an_edited_config(damaged: Path, edit: Callable[[dict[str, Any]], Any], message: str) -> None:
    _edit_config(damaged, edit)
    with pytest.raises((ValueError, RuntimeError), match=message):
        LLAMA.load(damaged)


def test_no_pickle_is_ever_read(damaged: Path) -> None:
    """A checkpoint in torch's pickle format is not opened for a packed model."""

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (damaged / "exploded",))

    (damaged / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Bomb()}, damaged / "pytorch_model.bin")
    with pytest.raises(Exception, match=r"."):
        LLAMA.load(damaged)
    assert not (damaged / "exploded").exists()


def test_a_crash_while_saving_leaves_old_new_or_nothing(
    saved: Path, damaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replace a 4-bit model by an 8-bit one and crash at every single file operation."""
    new = LLAMA.load(LLAMA.create(tmp_path / "float"), quantization_config=hf_lowbit.RTNConfig(bits=8, group_size=None))
    before, after = fingerprint(LLAMA.load(saved)), fingerprint(new)
    real = {name: getattr(os, name) for name in ("replace", "unlink")}
    outcomes = set()
    for crash_at in range(1, 40):
        folder = Path(shutil.copytree(saved, tmp_path / f"crash{crash_at}"))
        count = 0

        def crashing(name: str, crash_at: int = crash_at, folder: Path = folder) -> Callable[..., Any]:
            def operation(*arguments: Any, **keywords: Any) -> Any:
                nonlocal count
                if str(folder) in "".join(map(str, arguments)):
                    count += 1
                    if count == crash_at:
                        raise KeyboardInterrupt
                return real[name](*arguments, **keywords)

            return operation

        with monkeypatch.context() as patch:
            for name in real:
                patch.setattr(atomic.os, name, crashing(name))
            try:
                new.save_pretrained(folder)
                finished = True
            except KeyboardInterrupt:
                finished = False
        try:
            found = fingerprint(LLAMA.load(folder))
        except (OSError, ValueError):  # no config.json: transformers refuses the folder
            outcomes.add("nothing")
        else:
            assert found in (before, after)
            outcomes.add("old" if found == before else "new")
        if finished:
            break
    else:
        pytest.fail("saving never finished")
    assert {"nothing", "new"} <= outcomes
    assert not list(tmp_path.glob(".crash*")), "temporary folders are removed"
