"""Pictures of a row against the float ones and the real test set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from diffusion.rows import OTHER, REFERENCE, SEEDS, Row
from diffusion.settings import CLASSIFIER, Settings
from hf_lowbit.evaluation.pictures import (
    GaussianFit,
    PictureClassifier,
    agreement,
    compare_pictures,
    fit_gaussian,
    frechet_distance,
    kernel_distance,
    labels_of_prompts,
    noise_interval,
    paired_interval,
    polynomial_mmd,
)


def judge(settings: Settings, row: Row, pictures: Tensor, prompts: list[Any]) -> dict[str, Any]:
    """All that is measured of a row's pictures. The reference itself is held against the real pictures only."""
    classifier = PictureClassifier.load(CLASSIFIER)
    seen = classifier.see(pictures)
    fit = fit_gaussian(seen.features)
    found: dict[str, Any] = {"fid_real": frechet_distance(fit, real_pictures())}
    if row.name == REFERENCE:
        wanted = labels_of_prompts(prompts, classifier.config.labels)
        return {**found, "agreement": float(agreement(seen.logits, wanted).mean())}
    reference = load_pictures(settings, REFERENCE)
    if row.name not in SEEDS:
        found |= compare_pictures(pictures, reference, prompts=prompts, classifier=classifier)
        found["intervals"]["fid"] = paired_interval(seen.features, classifier.see(reference).features, _frechet)
        other = classifier.see(load_pictures(settings, OTHER)).features
        found["fid_other"] = frechet_distance(fit, fit_gaussian(other))
        found["kid_other"] = kernel_distance(seen.features, other, paired=True).value
        return found
    wanted = labels_of_prompts(prompts, classifier.config.labels)
    features = classifier.see(reference).features
    return {
        **found,
        "agreement": float(agreement(seen.logits, wanted).mean()),
        "fid": frechet_distance(fit, fit_gaussian(features)),
        "kid": kernel_distance(seen.features, features, paired=True).value,
    }


def noise(settings: Settings) -> dict[str, tuple[float, float]]:
    """95 % intervals of float against float with other seeds; the float rows must be drawn."""
    classifier = PictureClassifier.load(CLASSIFIER)
    sets = [classifier.see(load_pictures(settings, name)).features for name in SEEDS]
    return {
        "fid": noise_interval(sets, _frechet),
        "kid": noise_interval(sets, lambda a, b: polynomial_mmd(a, b, paired=True)),
    }


def real_pictures() -> GaussianFit:
    """The test set's features."""
    stored = load_file(CLASSIFIER / "real.safetensors")
    return GaussianFit(stored["mean"], stored["covariance"])


def save_pictures(settings: Settings, name: str, pictures: Tensor) -> None:
    """In 16 bits, for the rows that come after and for the grid."""
    path = _path(settings, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"pictures": pictures.half()}, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


def load_pictures(settings: Settings, name: str) -> Tensor:
    """Raises FileNotFoundError where a row was not drawn."""
    return load_file(_path(settings, name))["pictures"].float()


def _frechet(first: Tensor, second: Tensor) -> float:
    return frechet_distance(fit_gaussian(first), fit_gaussian(second))


def has_pictures(settings: Settings, name: str) -> bool:
    """Whether a row was drawn."""
    return _path(settings, name).exists()


def _path(settings: Settings, name: str) -> Path:
    return settings.folder / "pictures" / f"{name}.safetensors"
