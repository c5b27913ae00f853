"""The end of a load, the same for every library: nothing planned may be left float, nothing loaded may be corrupt."""

from __future__ import annotations

import importlib.metadata
import logging
from dataclasses import replace

from torch import nn

from hf_lowbit.config import LowbitConfig
from hf_lowbit.integrations.compensation import attach_compensation
from hf_lowbit.integrations.origin import base_model_record
from hf_lowbit.nn import CorruptWeightError
from hf_lowbit.plan import Plan, packed_modules
from hf_lowbit.reporting import Report, describe, peak_memory_bytes
from hf_lowbit.state import QuantizationState, attach_state
from hf_lowbit.tensorwise import Outcome, QuantizationError

logger = logging.getLogger("hf_lowbit")


def finish_quantization(model: nn.Module, config: LowbitConfig, plan: Plan, outcome: Outcome, seconds: float) -> Report:
    """Check coverage, write the report, remember both on the model, attach the compensation adapter if there is one.

    Raises:
        QuantizationError: a planned layer is not packed.
        ValueError: a compensation adapter on a plain module.
    """
    modules = packed_modules(model)
    missing = [
        f"{name}.{parameter}"
        for name, module in modules.items()
        for parameter in module.packed_parameters
        if not module.is_packed(parameter)
    ]
    missing += [
        f"{name}.{key}"
        for name, module in modules.items()
        for parameter in module.packed_parameters
        for key in module.companion_shapes(parameter)
        if not hasattr(module, key)
    ]
    missing += [name for name in plan.layers if name not in modules]
    if missing:
        raise QuantizationError(
            f"{len(missing)} of {len(plan.layers)} planned layers were not quantized (is the checkpoint complete?): "
            f"{', '.join(missing[:10])}"
        )
    # a method may have completed the specifications, as with an exponent that it searched
    closed = [module for module in modules.values() if not module.layer_spec.weight.is_open]
    completed = {id(getattr(m, name)): m.layer_spec for m in closed for name in m.packed_parameters}
    for module in modules.values():
        if module.layer_spec.weight.is_open:  # tied to one that was completed
            module.layer_spec = completed[id(getattr(module, module.packed_parameters[0]))]
    plan.layers = {name: replace(layer, spec=modules[name].layer_spec) for name, layer in plan.layers.items()}
    config.plan = plan.to_list()
    report = describe(model, str(config.quant_method).removeprefix("lowbit_"))
    for layer in report.layers:
        layer.error = outcome.errors.get(layer.name)
    report.skipped, report.warnings = dict(plan.skipped), list(plan.warnings)
    report.original_bits, report.seconds, report.peak_memory_bytes = outcome.original_bits, seconds, peak_memory_bytes()
    made = {"versions": library_versions(), "seed": config.seed, **base_model_record(model)}
    config.provenance = {**made, **config.provenance}
    state = QuantizationState(config, report, adapters=outcome.adapters)
    attach_state(model, state)
    attach_compensation(model, state)
    return report


def check_loaded(model: nn.Module, plan: Plan) -> None:
    """Refuse a quantized checkpoint whose tensors contradict its plan or hold impossible values.

    Raises:
        CorruptWeightError: naming the first such layer.
    """
    for name, module in packed_modules(model).items():
        try:
            module.check()
        except CorruptWeightError as error:
            raise CorruptWeightError(f"{name}: {error}; the checkpoint is damaged or its config was edited") from None


def library_versions() -> dict[str, str]:
    """Versions of what made a checkpoint."""
    names = ("hf-lowbit", "torch", "transformers", "diffusers", "peft")
    versions = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
