"""All metrics of a set of pictures, and the wrappers of pretrained networks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hf_lowbit.evaluation.pictures import (
    ClassifierConfig,
    InceptionFeatures,
    PictureClassifier,
    clip_score,
    compare_pictures,
)


@pytest.fixture
def classifier() -> PictureClassifier:
    return PictureClassifier(ClassifierConfig(("bag", "dress"), size=16, widths=(4, 8))).eval()


def test_without_classifier() -> None:
    reference = torch.rand(6, 1, 16, 16)
    found = compare_pictures(reference * 0.9, reference)
    assert set(found) == {"psnr", "ssim", "mean_absolute_error", "intervals"}
    assert found["mean_absolute_error"] == pytest.approx(0.1 * float(reference.mean()), rel=1e-5)
    low, high = found["intervals"]["ssim"]
    assert low <= found["ssim"] <= high < 1


def test_equal_pictures(classifier: PictureClassifier) -> None:
    reference = torch.rand(6, 1, 16, 16)
    found = compare_pictures(reference, reference, prompts=["a bag", "a dress", "?"] * 2, classifier=classifier)
    assert found["psnr"] == 100 and found["ssim"] == pytest.approx(1) and found["map_distance"] == 0
    assert found["fid"] == pytest.approx(0, abs=1e-6) and found["kid"] == pytest.approx(0, abs=1e-9)
    assert found["agreement"] == found["reference_agreement"] in (0, 0.25, 0.5, 0.75, 1)  # of 4: two ask for nothing


def test_worse_pictures_are_further_away(classifier: PictureClassifier) -> None:
    reference = torch.rand(20, 1, 16, 16)
    noise = torch.randn_like(reference)
    near, far = (compare_pictures(reference + s * noise, reference, classifier=classifier) for s in (0.01, 0.3))
    assert near["ssim"] > far["ssim"] and near["psnr"] > far["psnr"]
    for name in ("map_distance", "fid", "mean_absolute_error"):
        assert near[name] < far[name]


def test_any_features() -> None:
    reference = torch.rand(10, 1, 8, 8)
    found = compare_pictures(reference + 1, reference, features=lambda pictures: pictures.flatten(1)[:, :3])
    assert found["fid"] == pytest.approx(3, rel=1e-4)


def test_refusals() -> None:
    pictures = torch.rand(3, 1, 8, 8)
    with pytest.raises(ValueError, match="at least 2 pictures"):
        compare_pictures(pictures[:1], pictures[:1])
    with pytest.raises(ValueError, match="2 prompts for 3"):
        compare_pictures(pictures, pictures, prompts=["a", "b"])
    with pytest.raises(ValueError, match="NaN"):
        compare_pictures(pictures * float("nan"), pictures)


def test_pretrained_networks_say_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(FileNotFoundError, match="Inception's weights"):
        InceptionFeatures()
    with pytest.raises(FileNotFoundError, match="nothing is downloaded"):
        clip_score(torch.rand(1, 3, 8, 8), ["a bag"], tmp_path / "clip")
    pytest.importorskip("torchmetrics")
    (tmp_path / "weights.pth").touch()
    try:
        import torch_fidelity  # noqa: F401
    except ImportError:
        with pytest.raises(ImportError, match="torch-fidelity"):
            InceptionFeatures(tmp_path / "weights.pth")


def test_clip_score_of_a_folder(tmp_path: Path) -> None:
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(Path(__file__).parents[2] / "assets/sd-fashion/tokenizer")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": len(tokenizer), "max_position_embeddings": 16, "eos_token_id": 1}
    vision = {**sizes, "image_size": 16, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval()
    model.save_pretrained(tmp_path)
    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    processor = CLIPProcessor(images, tokenizer)
    processor.save_pretrained(tmp_path)
    pictures, prompts = torch.rand(3, 1, 8, 8), ["a bag", "a dress", "an ankle boot"]
    whole = list((255 * pictures).round().to(torch.uint8).expand(-1, 3, -1, -1))
    with torch.no_grad():
        logits = model(**processor(text=prompts, images=whole, return_tensors="pt", padding=True)).logits_per_image
        expected = 100 * float((logits.diagonal() / model.logit_scale.exp()).mean())
    assert expected != 0
    assert clip_score(pictures, prompts, tmp_path, batch_size=2) == pytest.approx(max(expected, 0), abs=1e-3)
    with pytest.raises(ValueError, match="2 prompts for 3"):
        clip_score(pictures, prompts[:2], tmp_path)
