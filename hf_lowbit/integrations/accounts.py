"""report(): the account of a quantized model, also of one that was loaded from a folder or the Hub."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import nn

from hf_lowbit.integrations.origin import read_beside
from hf_lowbit.nn import kind_of, refusal_of
from hf_lowbit.reporting import REPORT_FILE, Report, describe
from hf_lowbit.state import QuantizationState, state_of

NOT_PLANNED = "not in the plan"
_NOTHING = "this {} was not quantized by hf_lowbit, so that there is nothing to report"
_WRAPPED = ".base_layer"  # PEFT holds a layer with an adapter under this name


def report(model: Any) -> Report:
    """What was done to each layer of a quantized model, what it cost, and what was left out.

    For a model quantized in this process it is the report of quantization. For a reloaded one everything that can be
    counted is counted, and what only quantization knew (errors, reasons, warnings, time) is read from the
    ``lowbit_report.json`` it was saved with; without that file errors are None. A pipeline gets one report of all its
    quantized components, with their names in front of the layers'.

    Raises:
        ValueError: the model, or no component of the pipeline, was quantized by hf_lowbit.
    """
    if isinstance(model, nn.Module):
        return _report_of_module(model)
    components = quantized_components(model)
    if not components:
        raise ValueError(_NOTHING.format(type(model).__name__))
    return _merge({name: _report_of_module(component) for name, component in components.items()})


def quantized_components(pipeline: Any) -> dict[str, nn.Module]:
    """Name -> component of a pipeline's quantized models; empty for anything that is no pipeline."""
    parts = getattr(pipeline, "components", None)
    if isinstance(pipeline, nn.Module) or not isinstance(parts, dict):
        return {}
    return {name: part for name, part in parts.items() if state_of(part) is not None}


def quantized_owner(model: nn.Module) -> nn.Module:
    """The quantized model inside wrappers such as PEFT's; the model itself if it has none."""
    state = state_of(model)
    owners = (module for module in model.modules() if any(value is state for value in module.__dict__.values()))
    return model if state is None else next(owners, model)


def _report_of_module(model: nn.Module) -> Report:
    state = state_of(model)
    if state is None:
        raise ValueError(_NOTHING.format(type(model).__name__))
    if state.report is None:
        state.report = _recount(quantized_owner(model), state)
    return state.report


def _recount(model: nn.Module, state: QuantizationState) -> Report:
    counted = describe(model, str(state.config.quant_method).removeprefix("lowbit_"))
    for layer in counted.layers:
        layer.name = layer.name.replace(_WRAPPED, "")
        layer.tied_to = layer.tied_to and layer.tied_to.replace(_WRAPPED, "")
    stored = _stored_report(model, state)
    if stored is None or stored.method != counted.method:
        counted.skipped = _unpacked(model)
        return counted
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    known = {layer.name: layer for layer in stored.layers}
    for layer in counted.layers:
        same = known.get(layer.name) or known.get(prefix + layer.name) or known.get(layer.name.removeprefix(prefix))
        if same is not None and replace(same, name=layer.name, error=None, tied_to=layer.tied_to) == layer:
            layer.error = same.error
    return replace(stored, layers=counted.layers, other_bytes=counted.other_bytes, backend=counted.backend)


def _stored_report(model: nn.Module, state: QuantizationState) -> Report | None:
    revision = getattr(getattr(model, "config", None), "_commit_hash", None)
    text = read_beside(state.source, REPORT_FILE, revision=revision)
    try:
        return None if text is None else Report.from_dict(json.loads(text))
    except (ValueError, TypeError, AttributeError):  # damaged: the counts still hold
        return None


def _unpacked(model: nn.Module) -> dict[str, str]:
    """Float modules that a plan could have named, with the reason as far as it can be known from outside."""
    reasons = {}
    for name, module in model.named_modules():
        reason = refusal_of(module) or (NOT_PLANNED if kind_of(module) is not None else None)
        if reason is not None and ".lora_" not in name:  # an adapter is not part of the model
            reasons[name.replace(_WRAPPED, "")] = reason
    return reasons


def _merge(reports: dict[str, Report]) -> Report:
    parts = list(reports.values())
    return Report(
        method=" + ".join(dict.fromkeys(part.method for part in parts)),
        layers=[
            replace(layer, name=f"{name}.{layer.name}", tied_to=layer.tied_to and f"{name}.{layer.tied_to}")
            for name, part in reports.items()
            for layer in part.layers
        ],
        skipped={f"{name}.{module}": why for name, part in reports.items() for module, why in part.skipped.items()},
        warnings=[f"{name}: {warning}" for name, part in reports.items() for warning in part.warnings],
        other_bytes=sum(part.other_bytes for part in parts),
        original_bits=_common(part.original_bits for part in parts),
        seconds=_total(part.seconds for part in parts),
        peak_memory_bytes=max((part.peak_memory_bytes or 0 for part in parts), default=0) or None,
        evaluation=parts[0].evaluation
        if len(parts) == 1
        else {name: part.evaluation for name, part in reports.items() if part.evaluation},
        backend=" + ".join(dict.fromkeys(part.backend for part in parts)),
    )


def _common(values: Iterable[int | None]) -> int | None:
    distinct = set(values)
    return distinct.pop() if len(distinct) == 1 else None


def _total(values: Iterable[float | None]) -> float | None:
    known = list(values)
    return None if None in known else sum(value for value in known if value is not None)
