"""The recipe of QuEST: learned rounding and input scales of each timestep, then two stages of selective finetuning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from hf_lowbit.calibration.block import Block
from hf_lowbit.calibration.concatenations import find_concatenations
from hf_lowbit.calibration.input_ranges import search_range
from hf_lowbit.calibration.roles import find_roles
from hf_lowbit.calibration.selective import Finetuned, Samples, Stage, finetune
from hf_lowbit.calibration.split_rounding import describe_parts, round_split
from hf_lowbit.calibration.timesteps import timesteps_of
from hf_lowbit.config import ConfigError
from hf_lowbit.formats import ActivationSpec
from hf_lowbit.method import Recipe
from hf_lowbit_quest.config import QuESTConfig
from hf_lowbit_quest.stages import Selection, select, stages_of


def make_recipe(config: QuESTConfig) -> Recipe:
    """Which layers are special is found in the float model, by trying, before anything is changed."""
    chosen: list[Selection] = []
    parts: dict[str, tuple[int, ...]] = {}

    def prepare(model: nn.Module, batches: Sequence[dict[str, Any]]) -> list[str]:
        if any(timesteps_of(batch) is None for batch in batches):
            raise ConfigError(
                "QuESTConfig: the calibration data hold no 'timestep': QuEST is for denoisers of diffusion models. "
                "Quantize a pipeline with prompts=..., or give batches of the denoiser's arguments"
            )
        chosen[:] = [select(find_roles(model, batches[0]), config)]
        if config.split:
            parts.update(find_concatenations(model, batches[0]))
        return chosen[0].notes + describe_parts(parts)

    def calibrate(block: Block) -> None:
        for matrix in block.matrices.values():
            spec, name = matrix.layer_spec, block.full_name(matrix.layer)
            if spec.activation is not None:
                matrix.skeleton.layer_spec = replace(spec, activation=_inputs(spec.activation, name, chosen[0], config))
        round_split(block, config.training(quantized_inputs=False), parts, config.search_clip)

    def refine(original: nn.Module, model: nn.Module, batches: Sequence[dict[str, Any]]) -> list[str]:
        samples = Samples.of(batches, config.step_samples)
        return [
            _line(stage, finetune(original, model, samples, stage, config.seed))
            for stage in stages_of(model, chosen[0], config, len(samples.trained))
        ]

    return Recipe(
        calibrate=calibrate,
        targets=True,
        prepare=prepare,
        fit_inputs=search_range if config.search_inputs else None,
        refine=refine if config.epochs else None,
    )


def _inputs(activation: ActivationSpec, name: str, selection: Selection, config: QuESTConfig) -> ActivationSpec:
    """How a layer's input is quantized, given what it is."""
    if name in selection.ends and activation.bits < config.end_bits:
        return replace(activation, bits=config.end_bits, group_size=None)
    if name in selection.time and not config.per_timestep_scales:
        return replace(activation, timesteps=None)
    return activation


def _line(stage: Stage, result: Finetuned) -> str:
    change = f"the error of the model's output on held-out samples went from {result.before:.4g} to {result.after:.4g}"
    what = f"{stage.title} ({len(stage.weights)} weights, scales of {len(stage.inputs)} inputs)"
    if not result.kept:
        return f"finetuning of {what} did not help and was undone: {change}"
    return f"{what} are finetuned: {change}, best after pass {result.epoch}; errors of single layers are those before"
