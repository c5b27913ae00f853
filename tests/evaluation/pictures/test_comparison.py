"""Pipelines side by side: the trained text- and class-conditional ones, small."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

import hf_lowbit
from hf_lowbit.evaluation.pictures import PromptError, compare, draw_pictures
from hf_lowbit.evaluation.pictures.figures import pareto_front
from hf_lowbit.evaluation.points import SourceError
from tests.hub.fixture import Hub

ASSETS = Path(__file__).parents[2] / "assets"
SD, DIT = ASSETS / "sd-fashion", ASSETS / "dit-fashion"


@pytest.fixture(scope="module")
def dit() -> Any:
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(DIT, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipelines") / "dit-w4"
    hf_lowbit.quantize(DIT, hf_lowbit.RTNConfig(bits=4), output=folder)
    return folder


def test_pictures_depend_on_their_seeds_only(dit: Any) -> None:
    pictures = draw_pictures(dit, [1, 8, "9"], steps=2, seed=5)
    assert list(pictures.shape) == [3, 1, 32, 32] and pictures.dtype == torch.float32
    assert pictures.min() >= 0 and pictures.max() <= 1
    alone = draw_pictures(dit, [8, 9], steps=2, seed=6, batch_size=1)
    assert torch.allclose(pictures[1:], alone, atol=1e-4)
    assert not torch.allclose(pictures, draw_pictures(dit, [1, 8, 9], steps=2, seed=6), atol=1e-2)


def test_compare_writes_pictures_and_numbers(quantized: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    lines: list[str] = []
    found = compare(
        [DIT, quantized], ["0", "8"], steps=3, per_prompt=2, classifier=ASSETS / "fashion-classifier", say=lines.append
    )
    reference, row = found.rows
    assert (reference["method"], reference["bits_per_weight"]) == ("float", 16) and row["method"] == "rtn"
    assert row["bits_per_weight"] < 5 and row["denoiser_bytes"] < 0.5 * reference["denoiser_bytes"]
    assert reference["denoiser_bytes"] == (DIT / "transformer/diffusion_pytorch_model.safetensors").stat().st_size
    assert 0 < row["ssim"] < 1 and row["fid"] > 0 and 0 <= row["agreement"] <= 1
    assert len(lines) == 2 and list(found.pictures["dit-w4"].shape) == [4, 1, 32, 32]
    grid, pareto, numbers = found.save(tmp_path / "result")
    assert grid.read_bytes()[:4] == pareto.read_bytes()[:4] == b"\x89PNG"
    stored = json.loads(numbers.read_text())
    assert stored["rows"] == found.rows and stored["prompts"] == [0, 8] and stored["pictures"] == 4


def test_a_pipeline_against_itself(dit: Any) -> None:
    found = compare([dit, dit], [3, 4], steps=1)
    assert found.rows[1]["ssim"] == 1 and found.rows[1]["psnr"] == 100
    assert list(found.pictures) == ["DiTPipeline 1", "DiTPipeline 2"]


def test_refused_before_anything_is_drawn(dit: Any, tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="no prompt"):
        compare([DIT, SD], [])
    with pytest.raises(SourceError, match="two pipelines"):
        compare([DIT], [1])
    with pytest.raises(SourceError, match="model_index"):
        compare([DIT, ASSETS / "mamba-debian"], [1])
    with pytest.raises(SourceError, match="class labels and sd-fashion texts"):
        compare([DIT, SD], [1])
    with pytest.raises(PromptError, match="not 'a bag'"):
        compare([DIT, dit], ["a bag"])
    with pytest.raises(PromptError, match="'strength' is none of DiTPipeline's"):
        compare([DIT, dit], [1], strength=1)
    with pytest.raises(PromptError, match="'latents' is set by drawing itself"):
        compare([DIT, dit], [1], latents=None)
    with pytest.raises(ValueError, match="steps=0"):
        compare([DIT, dit], [1], steps=0)
    larger = tmp_path / "larger"
    (larger / "transformer").mkdir(parents=True)
    (larger / "vae").mkdir()
    for name in ("model_index.json", "vae/config.json"):
        (larger / name).write_text((DIT / name).read_text())
    config = json.loads((DIT / "transformer/config.json").read_text())
    (larger / "transformer/config.json").write_text(json.dumps({**config, "sample_size": 16}))
    with pytest.raises(SourceError, match="32 x 32 pixels, larger 64 x 64"):
        compare([DIT, larger], [1])


def test_a_repository_is_compared_as_its_folder(hub: Hub, quantized: Path) -> None:
    script = """if True:
        import sys, json, huggingface_hub, hf_lowbit
        folder, repo = sys.argv[1:]
        huggingface_hub.create_repo(repo)
        huggingface_hub.upload_folder(repo_id=repo, folder_path=folder)
        print(json.dumps(hf_lowbit.compare([folder, repo], [2, 3], steps=1).rows))"""
    folder, repo = json.loads(hub.python(script, str(quantized), "acme/dit-w4").splitlines()[-1])
    assert repo["ssim"] == 1 and repo["psnr"] == 100 and repo["label"] == "acme/dit-w4"
    assert repo["denoiser_bytes"] == folder["denoiser_bytes"] > 0


def test_pareto_front() -> None:
    assert pareto_front([(3, 1.0), (1, 5.0), (2, 6.0), (4, 1.0), (2, 4.0)]) == [1, 4, 0]
