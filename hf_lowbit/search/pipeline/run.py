"""search_pipeline(): bits of weights and inputs for every layer of a pipeline's denoiser, judged by its pictures."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_lowbit.allocation import select_exactly
from hf_lowbit.calibration.checkpoint import fingerprint_of
from hf_lowbit.calibration.data.running import dropout_off
from hf_lowbit.config import ConfigError, LowbitConfig
from hf_lowbit.evaluation.pictures.drawing import draw_pictures
from hf_lowbit.integrations.loading import pipeline_components
from hf_lowbit.integrations.trajectories import quiet
from hf_lowbit.method import config_of
from hf_lowbit.plan.patterns import first_match
from hf_lowbit.search.pipeline.choice import choose_inputs, choose_weights
from hf_lowbit.search.pipeline.inputs import input_ranges
from hf_lowbit.search.pipeline.judge import Judge
from hf_lowbit.search.pipeline.measurements import Measurements
from hf_lowbit.search.pipeline.recorded import look_at, trajectories
from hf_lowbit.search.pipeline.result import LayerChoice, PipelineSearchResult
from hf_lowbit.search.pipeline.sensitivity import Sensitivity
from hf_lowbit.search.pipeline.settings import Settings
from hf_lowbit.search.pipeline.subjects import subjects_of
from hf_lowbit.state import state_of

logger = logging.getLogger("hf_lowbit")


@torch.no_grad()
def search_pipeline(
    pipeline: Any,
    config: LowbitConfig | str = "mixdq",
    prompts: Sequence[str | int] | None = None,
    steps: int = 25,
    bits_per_weight: float = 4.0,
    bits_per_input: float | None = 8.0,
    *,
    candidates: Sequence[int] = (2, 4, 8),
    input_candidates: Sequence[int] = (4, 8),
    objective: str = "score",
    protect: float = 0.01,
    component: str | None = None,
    content: Sequence[str] | None = None,
    pictures: int = 8,
    samples: int = 32,
    scan: tuple[int, int] = (10, 10),
    seed: int = 0,
    measurements: str | Path | None = None,
    **arguments: Any,
) -> PipelineSearchResult:
    """Find bits for every layer of a pipeline's denoiser within a budget (MixDQ, arXiv 2405.17873). It is only read.

    Each layer is rounded alone, weights and inputs apart, at every width. What feed-forward nets and cross-attention
    ("content") lose is judged by the likeness of the pictures (SSIM), all other layers ("quality") by the noise in the
    denoiser's output (SQNR). An integer program spends a budget on each group; budgets and the ratio between the groups
    are tried out, and of these candidates the one whose pictures are nearest the float pipeline's is taken: first of
    the weights, then of the inputs with the weights fixed.

    Args:
        pipeline: of diffusers, float.
        config: a method's, or its name. Layers whose bits its overrides give keep them.
        prompts: texts, or class labels; the first ``pictures`` of them are drawn.
        steps: denoising steps.
        bits_per_weight: mean bits of the codes, scales not counted. What is found is at most 0.02 off one of the
            budgets that are tried, and not above this one where that can be.
        bits_per_input: mean bits of the inputs, those in full precision counted as 16; None: bits of weights alone.
        candidates: bits of weights; quality layers take those of at least 4, if there are any.
        input_candidates: bits of inputs: 4, 6 or 8.
        objective: of :data:`hf_lowbit.search.pipeline.OBJECTIVES`.
        protect: share of each group's layers whose inputs stay in full precision, the most sensitive; rounded up.
        component: of the pipeline; by default its denoiser.
        content: names or regular expressions of content layers, instead of
            :func:`hf_lowbit.search.pipeline.groups.group_layers`'s rules.
        samples: of the denoiser's calls on which noise is measured, over all timesteps.
        scan: how many budgets, from 0.3 below the one asked for up to it, and how many ratios are tried.
        seed: of the pictures' noise.
        measurements: a JSON file of finished measurements, begun or gone on with; other budgets need no new ones.
        arguments: others of the pipeline's call, such as height, width or guidance_scale.

    Returns:
        The choice, and the config with it: ``from_pretrained`` alone applies it, with scales of inputs that are made as
        they come, and ``hf_lowbit.quantize(pipeline, config, prompts=...)`` with static ones.

    Raises:
        AllocationError: budgets that the candidates cannot meet; that of weights before anything is measured.
        ConfigError: arguments that cannot be, or a denoiser that is quantized already.
        ResumeError: ``measurements`` of something else.
        SensitivityError: a float pipeline, or a rounded layer, that gives NaN or infinite values.
    """
    settings = Settings(
        steps, bits_per_weight, bits_per_input, tuple(candidates), tuple(input_candidates), objective, protect,
        pictures, samples, scan, seed,
    )  # fmt: skip
    config = config_of(config)
    name, model = _denoiser(pipeline, component)
    if isinstance(prompts, str) or not prompts:
        raise ConfigError('a search over a pipeline draws pictures: pass prompts=["a photo of a bag", ...]')
    drawn = list(prompts)[:pictures]
    subjects_of(model, config, settings, [], [".*"], {})  # refuses a budget that is out of reach in any case

    def draw() -> Tensor:
        with quiet(pipeline):
            return draw_pictures(pipeline, drawn, steps=steps, seed=seed, **arguments)

    with dropout_off(model), trajectories(pipeline, name, drawn, steps, seed, arguments) as batches:
        recorded = look_at(model, config, batches)
        subjects = subjects_of(model, config, settings, recorded.text_layers, content, recorded.parts)
        known = _measurements(measurements, model, config, settings, drawn, content, arguments)
        reading = [subject.name for subject in subjects if subject.inputs]
        ranges = input_ranges(model, reading, batches, recorded.parts, recorded.constant)
        sensitivity = Sensitivity(model, Judge(model, draw, recorded.spread(samples)), ranges, known)
        scores, input_scores = sensitivity.measure(subjects)
        bits, tried = choose_weights(subjects, scores, settings, sensitivity)
        inputs, protected, tried_inputs = choose_inputs(subjects, input_scores, settings, sensitivity, bits)
    layers = [
        LayerChoice(
            s.name, s.group, s.elements, ranges[s.name].size if s.name in ranges else 0, bits[s.name],
            inputs.get(s.name), s.name in protected, scores[s.name], input_scores[s.name],
        )
        for s in subjects
    ]  # fmt: skip
    chosen = _with_overrides(config, layers, bits_per_input is not None)
    result = PipelineSearchResult(chosen, name, bits_per_weight, layers, [*tried, *tried_inputs], recorded.notes)
    logger.info("%.4f bits per weight, %.4f per input", result.mean_bits, result.mean_input_bits)
    return result


def _denoiser(pipeline: Any, component: str | None) -> tuple[str, nn.Module]:
    found = pipeline_components(pipeline, None if component is None else [component])
    if len(found) > 1:
        raise ConfigError(f"the pipeline has several denoisers, {', '.join(found)}: name one as component")
    model: nn.Module = getattr(pipeline, found[0])
    if state_of(model) is not None:
        raise ConfigError("this pipeline is quantized already: bits are searched on the float one")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ConfigError("part of this pipeline is offloaded or on the meta device; load it whole")
    return found[0], model


def _measurements(
    path: str | Path | None,
    model: nn.Module,
    config: LowbitConfig,
    settings: Settings,
    prompts: Sequence[str | int],
    content: Sequence[str] | None,
    arguments: dict[str, Any],
) -> Measurements:
    """Kept under all that decides a measurement, budgets and what is scanned left out."""
    measured = ("steps", "samples", "seed")
    facts = {
        "settings": {key: value for key, value in asdict(settings).items() if key in measured},
        "config": config.to_dict(), "prompts": prompts, "content": content, "arguments": arguments,
    }  # fmt: skip
    known = Measurements(None if path is None else Path(path), fingerprint_of(model.state_dict().items(), facts))
    if known.taken:
        logger.info("%d measurements are taken from %s", known.taken, path)
    return known


def _with_overrides(config: LowbitConfig, layers: Sequence[LayerChoice], with_inputs: bool) -> LowbitConfig:
    """The config with the bits of every layer, before its own overrides, whose other fields they keep."""
    given = config.overrides or {}
    chosen: dict[str, dict[str, Any]] = {}
    for layer in layers:
        pattern = first_match(given, layer.name)
        own = dict(given[pattern]) if pattern else {}
        own["bits"] = layer.bits
        if with_inputs and layer.inputs:
            own["activation_bits"] = layer.input_bits
        chosen[layer.name] = own
    found = select_exactly(chosen, [layer.name for layer in layers])
    return replace(config, overrides={**found, **{key: given[key] for key in given if key not in found}}, plan=None)
