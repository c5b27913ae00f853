"""The classifier: saving, what it refuses, the trained one, and agreement with prompts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_lowbit.evaluation.pictures import (
    ClassifierConfig,
    PictureClassifier,
    agreement,
    fit_gaussian,
    frechet_distance,
    labels_of_prompts,
)

ASSETS = Path(__file__).parents[2] / "assets"
LABELS = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")


def test_saved_and_loaded(tmp_path: Path) -> None:
    model = PictureClassifier(ClassifierConfig(("a", "b"), 3, 16, (8, 12))).eval()
    model.save(tmp_path)
    loaded = PictureClassifier.load(tmp_path)
    assert loaded.config == model.config and not loaded.training
    seen = loaded.see(torch.rand(5, 3, 16, 16), batch_size=2)
    assert [list(m.shape) for m in seen.maps] == [[5, 8, 8, 8], [5, 12, 4, 4]]
    assert list(seen.features.shape) == [5, 12] and list(seen.logits.shape) == [5, 2]
    with pytest.raises(ValueError, match=r"\[n, 3, 16, 16\]"):
        loaded(torch.rand(5, 1, 16, 16))
    with pytest.raises(FileNotFoundError, match="no picture classifier"):
        PictureClassifier.load(tmp_path / "elsewhere")


def test_the_trained_one_knows_its_test_set() -> None:
    folder = ASSETS / "fashion-classifier"
    model = PictureClassifier.load(folder)
    assert model.config.labels == LABELS
    assert sum(path.stat().st_size for path in folder.iterdir()) < 1_000_000
    real = load_file(folder / "real.safetensors")
    kept = fit_gaussian(real["features"])
    assert kept.mean.shape == real["mean"].shape and int(real["count"]) == 10_000
    whole = type(kept)(real["mean"], real["covariance"])
    black = fit_gaussian(model.see(torch.zeros(4, 1, 32, 32)).features)
    assert frechet_distance(kept, whole) < 0.02 * frechet_distance(black, whole)


def test_prompts_name_classes() -> None:
    prompts = ["a photo of a t-shirt", "one shirt", "An Ankle Boot for sale", "trousers", "two dresses", "a photo"]
    assert labels_of_prompts(prompts, LABELS).tolist() == [0, 6, 9, 1, 3, -1]
    assert labels_of_prompts(["a bag on a coat", 7, "8", 12], LABELS).tolist() == [-1, 7, 8, -1]


def test_agreement() -> None:
    logits = torch.tensor([[0.0, 1.0], [3.0, 1.0], [0.0, 2.0]])
    assert agreement(logits, torch.tensor([1, 1, 1])).tolist() == [1, 0, 1]
    with pytest.raises(ValueError, match="3 pictures and 2"):
        agreement(logits, torch.tensor([1, 1]))
