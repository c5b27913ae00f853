"""quantize(): the one engine entry, for modules, models, pipelines, folders and repositories."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from hf_lowbit.calibration.placement import BlockWeights, Placement, PlacementError, as_device
from hf_lowbit.config import ConfigError, LowbitConfig
from hf_lowbit.engine import Run, calibrate
from hf_lowbit.integrations.calibrating import check_has_data
from hf_lowbit.integrations.finish import finish_quantization
from hf_lowbit.integrations.loading import (
    adopt,
    dequantize_model,
    is_pipeline,
    load_quantized,
    model_facts,
    pipeline_components,
    stored_components,
)
from hf_lowbit.integrations.offloading import load_without_blocks
from hf_lowbit.integrations.prompts import Prompts
from hf_lowbit.integrations.trajectories import record_trajectories
from hf_lowbit.method import Recipe, config_of, method_of
from hf_lowbit.nn import PackedModule
from hf_lowbit.output import prepare_output, resume_folder, save_complete
from hf_lowbit.plan import build_plan, install, packed_modules, replace_modules
from hf_lowbit.state import shared_weights, state_of
from hf_lowbit.tensorwise import Outcome, QuantizationError, quantize_parameter
from hf_lowbit.testbed.cache import cache_home

logger = logging.getLogger("hf_lowbit")


def quantize(
    target: Any,
    config: LowbitConfig | str,
    data: Any = None,
    output: str | Path | None = None,
    resume: bool = True,
    components: list[str] | None = None,
    *,
    prompts: Sequence[Any] | None = None,
    steps: int | None = None,
    timesteps: int | None = None,
    device: str | torch.device | None = None,
    weights: BlockWeights | Literal["disk"] | None = None,
    **arguments: Any,
) -> Any:
    """Quantize a model.

    Args:
        target: an nn.Module, a transformers or diffusers model, a diffusers pipeline (all changed in place), or a
            folder or repository id, which is loaded tensor by tensor.
        config: a method's config, or a method's name for its defaults.
        data: calibration data, for methods that need it; the same as ``config.dataset``. Of a pipeline, batches of the
            arguments of one component.
        output: folder to save the result in, with tokenizer or processor where the target has one. It must be new,
            empty, or hold an earlier result of hf_lowbit.
        resume: with ``output``, take a finished result of the same target and config as it is; of a calibrated run
            that was killed, take the finished blocks. False starts over.
        components: parts of a pipeline to quantize; by default its denoiser.
        prompts: of a pipeline, instead of ``data``: texts, class labels, or dictionaries of arguments of its call.
            ``config.num_samples`` pictures are drawn with them in turn, and what the denoiser is called with is the
            data; conditional and unconditional calls are samples alike.
        steps: of denoising; by default the pipeline's.
        timesteps: how many of the steps are recorded, evenly spaced; by default all, at most 25.
        device: that computes, such as "cuda"; by default the one that the model is on. The model stays where it is, a
            folder's on the CPU: its blocks come to the device one at a time and go back packed, activations stay in the
            host's memory, and on disk beyond half of what is free. So the device holds one block and what surrounds the
            blocks, and the bits are those of a model that is there as a whole. What a method does to the whole model
            before its first block runs where the model is; ``tuning``, and methods that train the whole model in the
            end, need it on the device. float32 products take TensorFloat-32 if
            ``torch.set_float32_matmul_precision("high")`` allows it, factors of Hessians and rounding never.
        weights: of blocks that are on the meta device, for a model that the host cannot hold either: each block's are
            read when it is reached, and dropped when it is packed. "disk" reads those of a local folder of a
            transformers model from its files. For methods that calibrate.
        arguments: others of the pipeline's call, such as guidance_scale, height and width.

    Returns:
        The quantized object.

    Raises:
        ConfigError: an unknown method, or prompts, steps and arguments that the target cannot be asked with.
        PlacementError: a device that is not there, or that the method cannot be run on in blocks.
        DataError: calibration data that cannot be used.
        PlanError: nothing to quantize, or a group that does not fit.
        QuantizationError: a layer that could not be quantized; a live model is then as it was.
        FileExistsError, PermissionError: an output folder that is in the way or cannot be written.
    """
    asked = _asked(prompts, steps, timesteps, arguments)
    source = str(target) if isinstance(target, str | Path) else None
    config = _resolve_config(config, data, asked)
    recipe = method_of(config).make_recipe(config)
    computer = _check_device(device, weights, source, recipe)
    asked = _check_asked(asked, target, config, recipe, components)
    if asked is not None:
        config.provenance = {**config.provenance, "request": asked.request()}
    if output is not None and prepare_output(Path(output), config, source, resume):
        logger.info("%s already holds this result; loading it", output)
        return load_quantized(output)
    run = Run(source is None, resume_folder(output), resume, computer, None if weights == "disk" else weights)
    if source is not None:
        config.provenance = {**config.provenance, "source": source}
    files = ExitStack()
    try:
        if source is not None and recipe.calibrate is None:
            result = load_quantized(source, config, components)
        else:
            if source is not None and weights == "disk":
                beside = None if output is None else Path(output).absolute().parent
                result, read = files.enter_context(load_without_blocks(source, config, beside))
                run = replace(run, weights=read)
            else:
                result = target if source is None else load_quantized(source)
            if isinstance(result, nn.Module):
                _quantize_module(result, config, recipe, run)
            else:
                _quantize_pipeline(result, config, components, recipe, run, asked)
        if output is not None:
            save_complete(result, Path(output), source)
    except BaseException:
        run.leave()
        raise
    finally:
        files.close()
    run.finish()
    if run.folder is not None and run.folder.is_dir() and not any(run.folder.iterdir()):
        run.folder.rmdir()  # one of a pipeline, whose components had theirs in it
    return result


def dequantize(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Put ordinary float modules in the place of a quantized model's packed ones, in place.

    Args:
        model: a quantized model of any library, or a plain module.
        dtype: of the restored weights; None takes the model's own.

    Raises:
        QuantizationError: the model is not quantized.
    """
    if state_of(model) is None:
        raise QuantizationError("this model is not quantized by hf_lowbit: there is nothing to dequantize")
    return dequantize_model(model, dtype)


def _asked(
    prompts: Sequence[Any] | None, steps: int | None, timesteps: int | None, arguments: dict[str, Any]
) -> Prompts | None:
    if prompts is not None:
        return Prompts(prompts, steps, timesteps, {k: v for k, v in arguments.items() if v is not None})
    given = {"steps": steps, "timesteps": timesteps, **arguments}
    if alone := [name for name, value in given.items() if value is not None]:
        raise ConfigError(f"{', '.join(alone)}: said of pictures that a pipeline draws; give prompts as well")
    return None


def _resolve_config(config: LowbitConfig | str, data: Any, asked: Prompts | None) -> LowbitConfig:
    resolved = config_of(config).copy_with_data(data, drawn=asked is not None)
    if asked is not None and resolved.dataset is not None:
        raise ConfigError("data (the config's dataset) and prompts are two sources of calibration data: give one")
    check_has_data(method_of(resolved), resolved, drawn=asked is not None)
    return resolved


def _check_asked(
    asked: Prompts | None, target: Any, config: LowbitConfig, recipe: Recipe, components: list[str] | None
) -> Prompts | None:
    """What a pipeline is to draw, None for nothing; refused before anything large is read or run."""
    stored = isinstance(target, str | Path)
    draws = is_pipeline(target) if stored else not isinstance(target, nn.Module)
    if asked is not None and not draws:
        what = f"{target} is no pipeline" if stored else f"a {type(target).__name__} is no pipeline"
        raise ConfigError(f"{what}: prompts are what a pipeline draws; pass data, batches of the model's arguments")
    if not draws or recipe.calibrate is None:
        if asked is not None:
            logger.info("the method %r needs no data: the prompts are not used", method_of(config).name)
        return None
    names = stored_components(target, components) if stored else pipeline_components(target, components)
    if asked is None and len(names) > 1:
        raise ConfigError(f"data holds the arguments of one model: name one of {', '.join(names)} in components")
    if asked is not None and not stored:
        asked.calls(target, 1)
    return asked


def _check_device(
    device: str | torch.device | None,
    weights: BlockWeights | Literal["disk"] | None,
    source: str | None,
    recipe: Recipe,
) -> torch.device | None:
    """The device that computes; refused before anything large is read or run."""
    computer = as_device(device)
    if weights is not None and recipe.calibrate is None:
        raise PlacementError("weights: a data-free method reads one tensor after the other by itself; leave it out")
    if weights is not None and (weights == "disk") != (source is not None):
        raise PlacementError(
            "weights='disk' reads the files of a folder; a model with blocks on the meta device takes a BlockWeights"
        )
    if computer is not None and source is not None and recipe.calibrate is None:
        raise PlacementError(
            f"device={str(device)!r}: a data-free method rounds the tensors of a folder or repository as they are "
            "loaded. Leave device out, or load the model and pass it"
        )
    return computer


def _quantize_pipeline(
    pipeline: Any,
    config: LowbitConfig,
    components: list[str] | None,
    recipe: Recipe,
    run: Run,
    asked: Prompts | None,
) -> None:
    names = pipeline_components(pipeline, components)
    for name in names:
        _check_float(getattr(pipeline, name))
    recorded: dict[str, Any] = {}
    if asked is not None:
        folder = cache_home().parent / "resume" if run.folder is None else run.folder / "trajectories"
        own_folder = run.folder is not None
        recorded, files = record_trajectories(
            pipeline, names, asked, config.num_samples, config.seed, folder, run.resume, own_folder
        )
        run.complete.append(files)
    for name in names:
        own = replace(run, folder=None if run.folder is None else run.folder / name)
        _quantize_module(getattr(pipeline, name), config.copy_with_data(recorded.get(name)), recipe, own)


@torch.no_grad()
def _quantize_module(model: nn.Module, config: LowbitConfig, recipe: Recipe, run: Run) -> nn.Module:
    """Quantize a live model in place; on failure every module is put back."""
    _check_float(model, run.weights is not None)
    if recipe.calibrate is not None:
        calibrate(model, config, recipe, run)
        adopt(model, config)
        return model
    started = time.monotonic()
    plan = build_plan(model, config, model_facts(model, shared_weights(model)))
    config.plan = plan.to_list()
    for warning in plan.warnings:
        logger.warning(warning)
    originals = {name: model.get_submodule(name) for name in plan.layers}
    placement = Placement(model, plan.layers, run.device)
    outcome = Outcome()
    iterations = 1 if config.low_rank is None else config.low_rank.iterations
    try:
        install(model, plan, packed=False)
        quantized: dict[int, PackedModule] = {}
        for name, module in packed_modules(model).items():
            for parameter in module.packed_parameters:
                weight = getattr(module, parameter)
                if (owner := quantized.setdefault(id(weight), module)) is not module:
                    _share(owner, module, parameter)
                    continue
                rank = config.adapter_rank(name)
                with placement.at_hand(name, module):
                    quantize_parameter(module, parameter, weight, recipe, name, outcome, rank, iterations)
                quantized[id(weight)] = module
        finish_quantization(model, config, plan, outcome, time.monotonic() - started)
    except BaseException:  # an interrupt or a lack of memory must not leave half a model either
        replace_modules(model, originals)
        raise
    adopt(model, config)
    return model


def _check_float(model: nn.Module, filled_later: bool = False) -> None:
    if state_of(model) is not None:
        raise QuantizationError("this model is quantized already; dequantize it first")
    if not filled_later and any(parameter.is_meta for parameter in model.parameters()):
        raise QuantizationError(
            "part of this model is offloaded or on the meta device; load it whole, pass its folder, or pass "
            "weights=..., from which blocks are read one at a time"
        )


def _share(owner: PackedModule, module: PackedModule, parameter: str) -> None:
    for key in module.companion_shapes(parameter):
        setattr(module, key, getattr(owner, key))
