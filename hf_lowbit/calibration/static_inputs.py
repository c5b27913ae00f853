"""Scales of static inputs: found on the data of a block whose layers are packed.

The block runs once more; what its layers then multiply, transformed and without the columns that are kept exact, is
what the scales are for. In that run every call has a scale of its own, so that no layer sees inputs which another's
guess has clipped.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_lowbit.calibration.block import Block
from hf_lowbit.calibration.fitting import FitInputs, fit_range
from hf_lowbit.calibration.input_histogram import InputHistogram
from hf_lowbit.calibration.parallel import combine, union
from hf_lowbit.formats import ActivationSpec, PackedTensor
from hf_lowbit.nn import LayerSpec, MixerSpec, PackedModule
from hf_lowbit.nn.inputs import is_scale
from hf_lowbit.nn.timestep import ARGUMENT, Timestep, rows_now, timestep_position
from hf_lowbit.plan import PlanError, PlannedLayer, packed_modules

__all__ = ["InputHistogram", "check_timesteps", "set_static_inputs", "with_dynamic_inputs"]

UNKNOWN_RANGE = "static inputs that are not finite, or zero, or missing on the calibration data: dynamic scales instead"


def check_timesteps(model: nn.Module, layers: Collection[PlannedLayer], batches: Sequence[dict[str, Any]]) -> bool:
    """Whether any layer has scales of timesteps, and model and data tell them.

    Raises:
        PlanError: they do not.
    """
    specs = [layer.spec.activation for layer in layers]
    if all(spec is None or spec.timesteps is None for spec in specs):
        return False
    if timestep_position(model) is None:
        raise PlanError(
            f"activation_timesteps=True: {type(model).__name__} is not told a timestep (its forward has no argument "
            "'timestep'); leave it out"
        )
    if batches[0].get(ARGUMENT) is None:
        raise PlanError("activation_timesteps=True: the calibration data hold no 'timestep'; add it, or leave it out")
    return True


@torch.no_grad()
def set_static_inputs(block: Block, percentile: float = 100.0, fit: FitInputs | None = None) -> None:
    """Give the packed layers of a block their input scales; those of no usable range get dynamic ones, and a note.

    Layers that read one input see the same values, and so have the same scales. Those that a method gave theirs keep
    them.

    Args:
        percentile: of |input| that the scales cover; 100: all of it.
        fit: finds them in another way.
    """
    modules = {name: m for name, m in packed_modules(block.module).items() if _is_open(m)}
    if not modules:
        return
    _complete_timesteps(block, modules.values())
    counting = fit is not None or percentile < 100
    histograms = {
        (name, parameter): InputHistogram(module.input_shape(parameter), counting, block.device)
        for name, module in modules.items()
        for parameter in module.packed_parameters
    }
    with _observed(modules, histograms):
        for batch in range(len(block)):
            block.run(batch)
    combine(histograms.values())
    for name, module in modules.items():
        own = {parameter: histograms[name, parameter] for parameter in module.packed_parameters}
        if not all(_is_usable(histogram) for histogram in own.values()) or not _fit(module, own, percentile, fit):
            module.layer_spec = with_dynamic_inputs(module.layer_spec)
            for parameter in module.packed_parameters:
                block.note(f"{name}.{parameter}" if name else parameter, UNKNOWN_RANGE)


def _is_open(module: PackedModule) -> bool:
    """Whether a layer has static inputs whose scales are still to be found."""
    return module.has_static_inputs and any(module.input_scale(name) is None for name in module.packed_parameters)


def with_dynamic_inputs(spec: LayerSpec) -> LayerSpec:
    """The specification with scales that are made as inputs come, where it has static ones; a mixer's are static
    always, and it computes in floats instead.
    """
    if spec.mixer is not None and spec.mixer.activation_bits is not None:
        spec = replace(spec, mixer=MixerSpec())
    if spec.activation is None or not spec.activation.static:
        return spec
    return replace(spec, activation=spec.activation.dynamic())


def _complete_timesteps(block: Block, modules: Collection[PackedModule]) -> None:
    """Those that the data has, where they are still to be found."""
    open_ = [m for m in modules if m.layer_spec.activation is not None and m.layer_spec.activation.timesteps == ()]
    if not open_:
        return
    given = [block.timestep(batch) for batch in range(len(block))]
    if any(values is None for values in given):
        raise PlanError(f"{block.name}: activation_timesteps=True, and part of the calibration data has no timestep")
    found = union(value for values in given for value in Timestep(values).values.tolist())
    timesteps = tuple(sorted(found, reverse=True))
    for module in open_:
        _set_activation(module, lambda activation: replace(activation, timesteps=timesteps))


def _set_activation(module: PackedModule, change: Callable[[ActivationSpec], ActivationSpec]) -> None:
    activation = module.layer_spec.activation
    assert activation is not None
    module.layer_spec = replace(module.layer_spec, activation=change(activation))


def _is_usable(histogram: InputHistogram) -> bool:
    """Whether every timestep and group was read, as finite values, not all of them zero."""
    low, high = histogram.low, histogram.high
    return bool(torch.isfinite(low).all() and torch.isfinite(high).all() and ((low != 0) | (high != 0)).any())


def _fit(
    module: PackedModule, histograms: Mapping[str, InputHistogram], percentile: float, fit: FitInputs | None
) -> bool:
    """Store the scales that a layer's parameters fit; False, and nothing is changed, where they cannot be."""
    activation = module.layer_spec.activation
    assert activation is not None
    found = {}
    for parameter, histogram in histograms.items():
        if fit is None:
            found[parameter] = fit_range(histogram, activation, percentile)
        else:
            found[parameter] = fit(histogram, activation)
        activation = found[parameter][0]  # of all parameters: what the first completes stays for the others
    specs = {spec for spec, _, _ in found.values()}
    if len(specs) > 1 or not all(is_scale(scale) for _, scale, _ in found.values()):
        return False
    module.layer_spec = replace(module.layer_spec, activation=specs.pop())
    for parameter, (_, scale, shift) in found.items():
        module.set_input_scale(parameter, scale, shift)
    return True


@contextmanager
def _observed(
    modules: Mapping[str, PackedModule], histograms: Mapping[tuple[str, str], InputHistogram]
) -> Iterator[None]:
    """Within it the modules' products update the histograms of their inputs."""
    try:
        for name, module in modules.items():
            own = {parameter: histograms[name, parameter] for parameter in module.packed_parameters}
            module.multiply = _Observed(module, own)  # type: ignore[method-assign]
        yield
    finally:
        for module in modules.values():
            module.__dict__.pop("multiply", None)


class _Observed:
    """In the place of :meth:`QuantizedInputs.multiply`."""

    def __init__(self, module: PackedModule, histograms: Mapping[str, InputHistogram]) -> None:
        self._multiply, self._histograms = module.multiply, histograms
        activation = module.layer_spec.activation
        self._timesteps = None if activation is None else activation.timesteps

    def __call__(self, x: Tensor, packed: PackedTensor, name: str = "weight", expert: int | None = None) -> Tensor:
        rows = 0 if self._timesteps is None else rows_now(self._timesteps, len(x))
        self._histograms[name].update(x, rows)
        return self._multiply(x, packed, name, expert)
