"""Blocks that come to a device one at a time, and blocks whose weights are read when they are reached."""

from __future__ import annotations

import copy
import gc
import weakref
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn

import hf_lowbit
from hf_lowbit.calibration.checkpoint import ResumeError
from hf_lowbit.calibration.placement import BlockWeights, PlacementError, as_device
from tests.matrix.models import MODELS, fingerprint


@pytest.fixture(scope="module", params=(torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
def whole(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    return MODELS["llama"].build().to(request.param).eval()


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_LOWBIT_HOME", str(tmp_path / "home"))


def config(method: str = "GPTQConfig", **values: Any) -> Any:
    ids = torch.randint(0, 250, (4, 16), generator=torch.Generator().manual_seed(0))
    calibrates = method != "RTNConfig" or "activation_static" in values
    data = {"dataset": ids, "num_samples": 4, "sequence_length": 16} if calibrates else {}
    return getattr(hf_lowbit, method)(bits=4, group_size=32, **data, **values)


def without_blocks(model: nn.Module) -> nn.Module:
    """A copy with its blocks on the meta device."""
    result = copy.deepcopy(model)
    for block in result.model.layers:
        block.to("meta")
    return result


def weights(model: Any, fingerprint: str = "seed 0") -> BlockWeights:
    return BlockWeights(lambda name: model.get_submodule(name).state_dict(), fingerprint)


@pytest.mark.parametrize("method", ("GPTQConfig", "RTNConfig"))
def test_a_device_that_is_named_changes_no_bit(whole: Any, method: str) -> None:
    expected, named = copy.deepcopy(whole), copy.deepcopy(whole)
    hf_lowbit.quantize(expected, config(method))
    hf_lowbit.quantize(named, config(method), device="cpu")
    assert fingerprint(named) == fingerprint(expected)


@pytest.mark.parametrize("values", ({}, {"quantize_embeddings": True, "quantize_lm_head": True}), ids=("blocks", "all"))
@pytest.mark.parametrize("method", ("GPTQConfig", "SignRoundConfig"))
def test_blocks_read_when_they_are_reached_give_the_same_bits(whole: Any, method: str, values: dict[str, Any]) -> None:
    few = {"iterations": 2} if method == "SignRoundConfig" else {}
    expected, partial = copy.deepcopy(whole), without_blocks(whole)
    hf_lowbit.quantize(expected, config(method, **values, **few))
    hf_lowbit.quantize(partial, config(method, **values, **few), weights=weights(whole))
    assert fingerprint(partial) == fingerprint(expected)
    reports = [hf_lowbit.report(model).layers for model in (expected, partial)]
    assert [layer.error for layer in reports[0]] == [layer.error for layer in reports[1]]


def test_no_more_than_one_block_is_there_as_floats(whole: Any) -> None:
    partial, there = without_blocks(whole), []

    def read(name: str) -> dict[str, Tensor]:
        floats = [
            block for block in partial.model.layers if any(p.dim() > 1 and not p.is_meta for p in block.parameters())
        ]
        there.append(sum(block.mlp.up_proj.weight.is_floating_point() for block in floats))
        return dict(whole.get_submodule(name).state_dict())

    hf_lowbit.quantize(partial, config(), weights=BlockWeights(read, ""))
    assert len(there) == 2 * len(partial.model.layers) and max(there) == 0


class Interrupted(Exception):
    pass


def test_a_failure_leaves_the_meta_model_and_a_run_that_resumes(whole: Any, tmp_path: Path) -> None:
    expected, partial = copy.deepcopy(whole), without_blocks(whole)
    hf_lowbit.quantize(expected, config())
    asked: list[str] = []

    def read(name: str) -> dict[str, Tensor]:
        asked.append(name)
        if len(asked) == len(partial.model.layers) + 2:
            raise Interrupted
        return dict(whole.get_submodule(name).state_dict())

    with pytest.raises(Interrupted):
        hf_lowbit.quantize(partial, config(), output=tmp_path / "out", weights=BlockWeights(read, "seed 0"))
    assert all(p.is_meta for block in partial.model.layers for p in block.parameters())
    assert not partial.model.embed_tokens.weight.is_meta
    with pytest.raises(ResumeError):
        hf_lowbit.quantize(partial, config(), output=tmp_path / "out", weights=weights(whole, "seed 1"))
    hf_lowbit.quantize(partial, config(), output=tmp_path / "out", weights=weights(whole))
    assert fingerprint(partial) == fingerprint(expected)


def test_a_block_that_is_taken_over_leaves_no_floats(whole: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also before cycles are collected: on a GPU every block counts."""
    from hf_lowbit.calibration.progress import Progress
    from hf_lowbit.calibration.walk import Walk

    with monkeypatch.context() as patch:
        patch.setattr("hf_lowbit.calibration.walk.wait_for_all", Mock(side_effect=[None, Interrupted]))
        with pytest.raises(Interrupted):
            hf_lowbit.quantize(without_blocks(whole), config(), weights=weights(whole))
    floats: list[weakref.ref[Tensor]] = []
    left: list[int] = []
    restore, step = Walk._restore, Progress.step

    def watched(walk: Walk, block: Any, *finished: Any) -> None:
        floats.extend(weakref.ref(matrix.skeleton.weight) for matrix in block.matrices.values())
        restore(walk, block, *finished)

    def counted(progress: Progress, *done: Any) -> None:
        left.append(sum(reference() is not None for reference in floats))
        step(progress, *done)

    monkeypatch.setattr(Walk, "_restore", watched)
    monkeypatch.setattr(Progress, "step", counted)
    gc.disable()
    try:
        hf_lowbit.quantize(without_blocks(whole), config(), weights=weights(whole))
    finally:
        gc.enable()
    assert floats and left == [0, 0]


def test_a_folder_is_read_block_by_block(whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source"
    whole.save_pretrained(source, max_shard_size="100KB")
    expected = hf_lowbit.quantize(source, config(), output=tmp_path / "expected")
    with monkeypatch.context() as patch:
        patch.setattr("hf_lowbit.calibration.progress.Progress.step", interrupted)
        with pytest.raises(Interrupted):
            hf_lowbit.quantize(source, config(), output=tmp_path / "out", weights="disk")
    result = hf_lowbit.quantize(source, config(), output=tmp_path / "out", weights="disk", device="cpu")
    assert fingerprint(result) == fingerprint(expected)
    saved = MODELS["llama"].load(tmp_path / "out", None)
    assert fingerprint(saved) == fingerprint(MODELS["llama"].load(tmp_path / "expected", None))
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "home") == ["expected", "out", "source"]


def interrupted(*_: Any) -> None:
    raise Interrupted


def test_weights_that_are_not_the_blocks_are_refused(whole: Any) -> None:
    lacking = BlockWeights(lambda name: {}, "")
    with pytest.raises(PlacementError, match=r"model\.layers\.0: .*missing"):
        hf_lowbit.quantize(without_blocks(whole), config(), weights=lacking)
    other = BlockWeights(lambda name: {k: v[:1] for k, v in whole.get_submodule(name).state_dict().items()}, "")
    with pytest.raises(PlacementError, match="of shape"):
        hf_lowbit.quantize(without_blocks(whole), config(), weights=other)
    partial = without_blocks(whole)
    partial.lm_head.to("meta")
    with pytest.raises(PlacementError, match="only blocks are made later"):
        hf_lowbit.quantize(partial, config(), weights=weights(whole))


def test_what_needs_the_whole_model_is_refused(whole: Any) -> None:
    partial = without_blocks(whole)
    for asked, what in (
        (config(tuning=hf_lowbit.TuningConfig()), "tuning trains the whole model"),
        (config(rotate=True), "reads the whole model before its first block"),
        (config().copy_with_data("self"), "dataset='self'"),
        (config("RTNConfig"), "data-free"),
    ):
        with pytest.raises(PlacementError, match=what):
            hf_lowbit.quantize(partial, asked, weights=weights(whole))
    with pytest.raises(hf_lowbit.quantization.QuantizationError, match=r"weights=\.\.\."):
        hf_lowbit.quantize(partial, config())


def test_devices_that_are_not_there_are_refused(whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device, what in (("cuda", "no GPU"), ("tpu0!", "no device of torch's"), ("meta", "'cpu' and 'cuda'")):
        with pytest.raises(PlacementError, match=what):
            hf_lowbit.quantize(whole, config(), device=device)
    with pytest.raises(PlacementError, match="as they are"):
        hf_lowbit.quantize(str(tmp_path), "rtn", device="cpu")
    with pytest.raises(PlacementError, match="takes a BlockWeights"):
        hf_lowbit.quantize(whole, config(), weights="disk")
    with pytest.raises(hf_lowbit.ConfigError, match="no local folder"):
        hf_lowbit.quantize(str(tmp_path), config(), weights="disk")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert as_device("cuda") == torch.device("cuda", 1) and as_device(None) is None
    with pytest.raises(PlacementError, match="2 GPUs"):
        as_device("cuda:2")
