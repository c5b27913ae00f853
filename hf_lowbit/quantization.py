"""quantize(): the one engine entry, for modules, models, pipelines, folders and repositories."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_lowbit.config import ConfigError, LowbitConfig
from hf_lowbit.engine import Run, calibrate
from hf_lowbit.integrations.calibrating import check_has_data
from hf_lowbit.integrations.finish import finish_quantization
from hf_lowbit.integrations.loading import adopt, dequantize_model, load_quantized, model_facts, pipeline_components
from hf_lowbit.method import Recipe, method_of, methods
from hf_lowbit.nn import PackedModule
from hf_lowbit.output import prepare_output, resume_folder, save_complete
from hf_lowbit.plan import build_plan, install, packed_modules, replace_modules
from hf_lowbit.state import shared_weights, state_of
from hf_lowbit.tensorwise import Outcome, QuantizationError, quantize_parameter

logger = logging.getLogger("hf_lowbit")


def quantize(
    target: Any,
    config: LowbitConfig | str,
    data: Any = None,
    output: str | Path | None = None,
    resume: bool = True,
    components: list[str] | None = None,
) -> Any:
    """Quantize a model.

    Args:
        target: an nn.Module, a transformers or diffusers model, a diffusers pipeline (all changed in place), or a
            folder or repository id, which is loaded tensor by tensor.
        config: a method's config, or a method's name for its defaults.
        data: calibration data, for methods that need it; the same as ``config.dataset``.
        output: folder to save the result in, with tokenizer or processor where the target has one. It must be new,
            empty, or hold an earlier result of hf_lowbit.
        resume: with ``output``, take a finished result of the same target and config as it is; of a calibrated run
            that was killed, take the finished blocks. False starts over.
        components: parts of a pipeline to quantize; by default its denoiser.

    Returns:
        The quantized object.

    Raises:
        ConfigError: an unknown method.
        PlanError: nothing to quantize, or a group that does not fit.
        QuantizationError: a layer that could not be quantized; a live model is then as it was.
        FileExistsError, PermissionError: an output folder that is in the way or cannot be written.
    """
    config = _resolve_config(config, data)
    source = str(target) if isinstance(target, str | Path) else None
    if output is not None and prepare_output(Path(output), config, source, resume):
        logger.info("%s already holds this result; loading it", output)
        return load_quantized(output)
    recipe = method_of(config).make_recipe(config)
    run = Run(undo=source is None, folder=resume_folder(output), resume=resume)
    if source is not None:
        config.provenance = {**config.provenance, "source": source}
    if source is not None and recipe.calibrate is None:
        result = load_quantized(source, config, components)
    elif source is not None:
        result = _quantize_module(_one_model(load_quantized(source), source, config), config, recipe, run)
    elif isinstance(target, nn.Module):
        result = _quantize_module(target, config, recipe, run)
    else:
        result = _quantize_pipeline(target, config, components, recipe, run)
    if output is not None:
        save_complete(result, Path(output), source)
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


def _resolve_config(config: LowbitConfig | str, data: Any) -> LowbitConfig:
    if isinstance(config, str):
        if config not in methods():
            raise ConfigError(f"unknown method {config!r}; installed: {', '.join(methods())}")
        config = methods()[config].config_class()  # type: ignore[call-arg]  # quant_method is a class attribute here
    elif not isinstance(config, LowbitConfig):
        raise ConfigError(f"config must be a method's config or its name, not {type(config).__name__}")
    resolved = config.copy_with_data(data)
    check_has_data(method_of(resolved), resolved)
    return resolved


def _one_model(loaded: Any, source: str, config: LowbitConfig) -> nn.Module:
    if not isinstance(loaded, nn.Module):
        raise ConfigError(
            f"{source} is a pipeline, which {method_of(config).name!r} cannot calibrate as a whole: pass one of its "
            "models, and batches of that model's arguments as data"
        )
    return loaded


def _quantize_pipeline(
    pipeline: Any, config: LowbitConfig, components: list[str] | None, recipe: Recipe, run: Run
) -> Any:
    for name in pipeline_components(pipeline, components):
        _quantize_module(getattr(pipeline, name), config.copy_with_data(None), recipe, run)
    return pipeline


@torch.no_grad()
def _quantize_module(model: nn.Module, config: LowbitConfig, recipe: Recipe, run: Run) -> nn.Module:
    """Quantize a live model in place; on failure every module is put back."""
    if state_of(model) is not None:
        raise QuantizationError("this model is quantized already; dequantize it first")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise QuantizationError(
            "part of this model is offloaded or on the meta device; load it whole, or pass its folder"
        )
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
                quantize_parameter(module, parameter, weight, recipe, name, outcome, rank, iterations)
                quantized[id(weight)] = module
        finish_quantization(model, config, plan, outcome, time.monotonic() - started)
    except BaseException:  # an interrupt or a lack of memory must not leave half a model either
        replace_modules(model, originals)
        raise
    adopt(model, config)
    return model


def _share(owner: PackedModule, module: PackedModule, parameter: str) -> None:
    for key in module.companion_shapes(parameter):
        setattr(module, key, getattr(owner, key))
