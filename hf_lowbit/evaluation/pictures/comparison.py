"""Several pipelines draw the same prompts from the same seeds; all are held against the first, the float one."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_lowbit.evaluation.pictures.candidates import account_of, candidates_of
from hf_lowbit.evaluation.pictures.classifier import PictureClassifier
from hf_lowbit.evaluation.pictures.drawing import check_prompts, draw_pictures
from hf_lowbit.evaluation.pictures.summary import Features, compare_pictures


@dataclass
class Comparison:
    """What :func:`compare` found.

    Attributes:
        prompts: a text or a class label for each row of the grid.
        steps, seed, per_prompt: as asked.
        rows: one for each pipeline, the reference first: "label", "source", "method", "bits_per_weight",
            "denoiser_bytes", "seconds_per_picture"; of the others also what :func:`compare_pictures` measures.
        pictures: label -> float [per_prompt * prompts, c, h, w] in [0, 1], all prompts in turn.
    """

    prompts: list[Any]
    steps: int
    seed: int
    per_prompt: int
    rows: list[dict[str, Any]] = field(default_factory=list)
    pictures: dict[str, Tensor] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """All but the pictures, as plain data."""
        drawn = len(self.prompts) * self.per_prompt
        asked = {"prompts": self.prompts, "steps": self.steps, "seed": self.seed, "pictures": drawn}
        return {**asked, "rows": self.rows}

    def save(self, folder: str | Path) -> list[Path]:
        """Write grid.png, pareto.png and compare.json.

        Returns:
            The three.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from hf_lowbit.evaluation.pictures.figures import draw_grid, draw_pareto

        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        grid, pareto, numbers = (path / name for name in ("grid.png", "pareto.png", "compare.json"))
        columns = {_heading(row): self.pictures[row["label"]] for row in self.rows}
        draw_grid(columns, self.prompts, grid)
        draw_pareto(self.rows, pareto, f"{len(self.prompts) * self.per_prompt} pictures, {self.steps} steps")
        numbers.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
        return [grid, pareto, numbers]


def compare(
    pipelines: Sequence[Any],
    prompts: Sequence[str | int],
    *,
    steps: int = 25,
    seed: int = 0,
    per_prompt: int = 1,
    batch_size: int = 16,
    classifier: PictureClassifier | str | Path | None = None,
    features: Features | None = None,
    window_size: int | None = 11,
    device: str | torch.device = "cpu",
    say: Callable[[str], None] | None = None,
    **arguments: Any,
) -> Comparison:
    """Compare diffusion pipelines by what they draw; each is loaded, draws and is released before the next.

    Args:
        pipelines: folders, repositories or pipelines of diffusers, the float one first.
        prompts: texts; for class-conditional pipelines class labels.
        steps: denoising steps.
        seed: of the first picture; the others count up from it.
        per_prompt: pictures of each prompt; the grid shows the first.
        classifier: adds distances in its features, and agreement with the prompts; the folder of a saved one, too.
        features: pictures -> features, for FID and KID, in the place of the classifier's.
        window_size: of SSIM; None for a global one.
        say: called with a line about the progress.
        arguments: others of the pipelines' calls, such as height, width or guidance_scale.

    Raises:
        PromptError: no prompts, or prompts or arguments that the pipelines do not take.
        SourceError: what is no pipeline, or pipelines that do not draw the same.
        ValueError: a count that cannot be, or pictures that are not finite.
    """
    for name, count in (("steps", steps), ("per_prompt", per_prompt), ("batch_size", batch_size)):
        if count < 1:
            raise ValueError(f"{name}={count}: at least 1 is needed")
    check_prompts(prompts, classes=False)  # none at all is refused before anything is read
    candidates = candidates_of(pipelines, arguments)
    asked = check_prompts(prompts, candidates[0].classes)
    if isinstance(classifier, str | Path):
        classifier = PictureClassifier.load(classifier)
    every = asked * per_prompt
    result = Comparison(asked, steps, seed, per_prompt)
    reference: Tensor | None = None
    for candidate in candidates:
        pipeline = candidate.load(device)
        account = account_of(candidate, pipeline)
        draw_pictures(pipeline, every[:1], steps=1, seed=seed, **arguments)  # what is set up once is not timed
        started = time.monotonic()
        pictures = draw_pictures(pipeline, every, steps=steps, seed=seed, batch_size=batch_size, **arguments)
        seconds = time.monotonic() - started
        row = {
            "label": candidate.label,
            "source": None if candidate.source is None else str(candidate.source),
            "method": account.method,
            "bits_per_weight": account.bits_per_weight,
            "denoiser_bytes": account.denoiser_bytes,
            "seconds_per_picture": seconds / len(every),
        }
        if reference is None:
            reference = pictures
        else:
            row |= compare_pictures(
                pictures, reference, prompts=every, classifier=classifier, features=features,
                window_size=window_size, seed=seed,
            )  # fmt: skip
        result.rows.append(row)
        result.pictures[candidate.label] = pictures
        if say is not None:
            say(f"{candidate.label}: {len(every)} pictures in {seconds:.1f} s")
        del pipeline
        gc.collect()
    return result


def _heading(row: dict[str, Any]) -> str:
    return f"{row['label']}\n{row['bits_per_weight']:.3g} bits"
