"""All that is measured of one set of pictures against the float model's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from hf_lowbit.evaluation.bootstrap import bootstrap_interval
from hf_lowbit.evaluation.pictures.agreement import agreement, labels_of_prompts
from hf_lowbit.evaluation.pictures.classifier import PictureClassifier, Seen
from hf_lowbit.evaluation.pictures.frechet import fit_gaussian, frechet_distance
from hf_lowbit.evaluation.pictures.kernel import kernel_distance
from hf_lowbit.evaluation.pictures.perceptual import map_distance
from hf_lowbit.evaluation.pictures.similarity import psnr, ssim

EQUAL_DB = 100.0  # a picture that equals its reference counts as this PSNR

Features = Callable[[Tensor], Tensor]


def compare_pictures(
    pictures: Tensor,
    reference: Tensor,
    *,
    prompts: Sequence[str | int] | None = None,
    classifier: PictureClassifier | None = None,
    features: Features | None = None,
    window_size: int | None = 11,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure pictures against the float model's of the same prompts and seeds.

    Args:
        pictures, reference: float [n, c, h, w] in [0, 1], in the same order.
        prompts: of each picture; agreement needs them, and a classifier.
        classifier: for "map_distance" and "agreement"; its features also serve "fid" and "kid".
        features: pictures -> features [n, d], in the place of the classifier's.
        window_size: of SSIM; None for a global one.
        seed: of resamples.

    Returns:
        Means over pictures of "psnr" (dB; equal pictures count as 100), "ssim" and "mean_absolute_error"; with a
        classifier "map_distance", "agreement" and "reference_agreement" (shares of pictures whose prompt names one
        class); with features "fid" and "kid" (the same seeds: paired). "intervals": name -> [low, high], 95 %, by
        bootstrap over pictures; of "kid" over subsets.

    Raises:
        ValueError: no or a single picture, shapes or prompts that do not fit, or pictures that are not finite.
    """
    if len(pictures) < 2:
        raise ValueError("at least 2 pictures are needed to compare sets of them")
    if prompts is not None and len(prompts) != len(pictures):
        raise ValueError(f"{len(prompts)} prompts for {len(pictures)} pictures")
    if not pictures.isfinite().all():
        raise ValueError("there are pictures with NaN or infinite values")
    means: dict[str, Tensor] = {
        "psnr": psnr(pictures, reference).clamp(max=EQUAL_DB),
        "ssim": ssim(pictures, reference, window_size),
        "mean_absolute_error": (pictures.double() - reference.double()).abs().flatten(1).mean(1),
    }
    found: dict[str, Any] = {}
    seen: tuple[Seen, Seen] | None = None
    if classifier is not None:
        seen = classifier.see(pictures), classifier.see(reference)
        means["map_distance"] = map_distance(seen[0].maps, seen[1].maps)
        if prompts is not None:
            wanted = labels_of_prompts(prompts, classifier.config.labels)
            asked = wanted >= 0
            if asked.any():
                for name, one in zip(("agreement", "reference_agreement"), seen, strict=True):
                    means[name] = agreement(one.logits[asked], wanted[asked])
    found |= {name: float(values.mean()) for name, values in means.items()}
    intervals = {name: _interval(values, seed) for name, values in means.items() if len(values) > 1}
    both = None
    if features is not None:
        both = features(pictures), features(reference)
    elif seen is not None:
        both = seen[0].features, seen[1].features
    if both is not None:
        found["fid"] = frechet_distance(fit_gaussian(both[0]), fit_gaussian(both[1]))
        found["kid"], *bounds = kernel_distance(*both, paired=True, seed=seed)
        intervals["kid"] = list(bounds)
    return {**found, "intervals": intervals}


def _interval(values: Tensor, seed: int) -> list[float]:
    return list(bootstrap_interval(values.tolist(), [1.0] * len(values), seed=seed))
