"""Pipelines to compare: what is known of them before any is loaded, and loading them one after the other."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_lowbit.evaluation.pictures.drawing import check_arguments, takes_classes
from hf_lowbit.evaluation.points import SourceError, label_of
from hf_lowbit.integrations.loading import DENOISERS, pipeline_components, read_json
from hf_lowbit.state import state_of


@dataclass
class Candidate:
    """One pipeline of a comparison.

    Attributes:
        label: its folder's name, or the whole path where several have the same.
        source: a folder; None for a pipeline given as an object.
        pipeline: the object; None for a folder.
        kind: its class.
        size: height and width that it draws when not told otherwise, in pixels; None where its configs do not say.
    """

    label: str
    source: Path | None
    pipeline: Any
    kind: type
    size: int | None

    @property
    def classes(self) -> bool:
        """Whether it draws class labels, not texts."""
        return takes_classes(self.kind)

    def load(self, device: str | torch.device) -> Any:
        """The pipeline in float32 (packed weights stay what they are), on a device, without progress bars."""
        pipeline = self.pipeline
        if pipeline is None:
            from diffusers import DiffusionPipeline

            pipeline = DiffusionPipeline.from_pretrained(str(self.source), torch_dtype=torch.float32)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline.to(device)

    def stored_bytes(self, pipeline: Any) -> int:
        """Bytes of the denoiser: of its weight files in a folder, else of its tensors as they are."""
        names = pipeline_components(pipeline)
        if self.source is not None:
            return sum(
                path.stat().st_size
                for name in names
                for path in (self.source / name).glob("*")
                if path.suffix in (".safetensors", ".bin")
            )
        models = [getattr(pipeline, name) for name in names]
        tensors = {id(t): t for model in models for t in (*model.parameters(), *model.buffers())}
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


@dataclass
class Account:
    """What a loaded pipeline is: its method ("float" for none), bits per weight and bytes of its denoiser."""

    method: str
    bits_per_weight: float
    denoiser_bytes: int


def account_of(candidate: Candidate, pipeline: Any) -> Account:
    """The account of a candidate that was loaded; a float one's bits are those of its stored weights."""
    from hf_lowbit.integrations.accounts import report

    stored = candidate.stored_bytes(pipeline)
    models: list[nn.Module] = [getattr(pipeline, name) for name in pipeline_components(pipeline)]
    if all(state_of(model) is None for model in models):
        weights = sum(parameter.numel() for model in models for parameter in model.parameters())
        return Account("float", round(8 * stored / weights), stored)
    found = report(pipeline)
    return Account(label_of(found), found.bits_per_weight, stored)


def candidates_of(pipelines: Sequence[Any], arguments: Mapping[str, Any]) -> list[Candidate]:
    """Check and name pipelines: folders, repositories (which are downloaded), or objects of diffusers.

    Args:
        arguments: of their calls, besides those that drawing sets.

    Raises:
        PromptError: one that draws neither texts nor class labels, or takes no such argument.
        SourceError: fewer than two, what is no pipeline, or pipelines that do not draw the same: classes and texts,
            or other sizes.
    """
    if len(pipelines) < 2:
        raise SourceError("a comparison needs two pipelines at least: the float one first")
    labels = _labels(pipelines)
    found = [_candidate(given, label) for given, label in zip(pipelines, labels, strict=True)]
    for one in found:
        check_arguments(one.kind, arguments)
        _check_alike(found[0], one, sized=not {"height", "width"} & set(arguments))
    return found


def _check_alike(first: Candidate, other: Candidate, sized: bool) -> None:
    if other.classes != first.classes:
        kinds = {True: "class labels", False: "texts"}
        raise SourceError(
            f"{first.label} draws {kinds[first.classes]} and {other.label} {kinds[other.classes]}: nothing to compare"
        )
    if sized and None not in (first.size, other.size) and other.size != first.size:
        raise SourceError(
            f"pictures of different sizes cannot be compared: {first.label} draws {first.size} x {first.size} "
            f"pixels, {other.label} {other.size} x {other.size}"
        )


def _candidate(given: Any, label: str) -> Candidate:
    import diffusers

    if not isinstance(given, str | Path):
        if not isinstance(given, diffusers.DiffusionPipeline):
            raise SourceError(f"a pipeline, its folder or its repository is needed, not a {type(given).__name__}")
        return Candidate(label, None, given, type(given), _size(_live_config(given)))
    index = read_json(given, "model_index.json")
    if index is None:
        raise SourceError(f"{given} holds no diffusion pipeline: it has no model_index.json")
    folder = Path(given)
    if not folder.is_dir():
        folder = Path(diffusers.DiffusionPipeline.download(str(given)))
    kind = getattr(diffusers, str(index.get("_class_name")), None)
    if kind is None:
        raise SourceError(f"{given} holds a {index.get('_class_name')}, which this diffusers does not know")
    configs = {name: folder / name / "config.json" for name in (*DENOISERS, "vae")}
    parts = {name: json.loads(path.read_text()) for name, path in configs.items() if path.is_file()}
    return Candidate(label, folder, None, kind, _size(parts))


def _live_config(pipeline: Any) -> dict[str, Any]:
    parts = {name: pipeline.components.get(name) for name in (*DENOISERS, "vae")}
    return {name: dict(part.config) for name, part in parts.items() if part is not None}


def _size(parts: dict[str, Any]) -> int | None:
    """Pixels: the denoiser's sample_size times 2 for each but the last block of the autoencoder."""
    samples = next((parts[name]["sample_size"] for name in DENOISERS if parts.get(name, {}).get("sample_size")), None)
    blocks = parts.get("vae", {}).get("block_out_channels")
    return samples * 2 ** (len(blocks) - 1) if isinstance(samples, int) and blocks else None


def _labels(pipelines: Sequence[Any]) -> list[str]:
    """Names of folders, whole paths where several have one name, and numbered where even these are the same."""
    whole = [str(given) if isinstance(given, str | Path) else type(given).__name__ for given in pipelines]
    short = [Path(name).name for name in whole]
    names = [one if short.count(one) == 1 else path for one, path in zip(short, whole, strict=True)]
    return [name if names.count(name) == 1 else f"{name} {index}" for index, name in enumerate(names, 1)]
