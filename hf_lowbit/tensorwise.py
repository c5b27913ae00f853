"""Quantize one parameter of one module, as loading a checkpoint and merging an adapter do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from hf_lowbit.calibration.block import PackedParameter
from hf_lowbit.calibration.low_rank import Compensation
from hf_lowbit.compensation import low_rank_factors
from hf_lowbit.compensation.stacked import Weighting, encoded_factors, stacked_factors
from hf_lowbit.formats import PackedTensor, decode
from hf_lowbit.method import Recipe
from hf_lowbit.nn import PackedModule
from hf_lowbit.nn.factors import expand_low_rank
from hf_lowbit.rounding import relative_error

_float_weights: ContextVar[dict[str, Tensor] | None] = ContextVar("float_weights", default=None)


class QuantizationError(ValueError):
    """A layer that could not be quantized; the message names it."""


@dataclass
class Outcome:
    """What quantizing a model's parameters left behind.

    Attributes:
        errors: parameter name -> ||w - w_hat|| / ||w||.
        adapters: module name -> (A, B) of the error's low-rank part, where it becomes an adapter.
        original_bits: width of the float weights.
    """

    errors: dict[str, float] = field(default_factory=dict)
    adapters: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    original_bits: int | None = None


@contextmanager
def keep_float_weights() -> Iterator[dict[str, Tensor]]:
    """Keep what is rounded: full parameter name -> the float weight just before, with all that was rewritten before.

    In the original layout; a transform of the packed layer is folded in, so that an ordinary layer with this weight
    computes what the packed one would if rounding cost nothing. Weights that share another's storage are left out.
    They take as much memory as the model's quantized layers in float.
    """
    kept: dict[str, Tensor] = {}
    token = _float_weights.set(kept)
    try:
        yield kept
    finally:
        _float_weights.reset(token)


@torch.no_grad()
def quantize_parameter(
    module: PackedModule,
    name: str,
    weight: Tensor,
    recipe: Recipe,
    where: str,
    outcome: Outcome,
    adapter_rank: int = 0,
    iterations: int = 1,
) -> None:
    """Round a float parameter and put the packed one in its place.

    Args:
        module: in the unpacked state, or packed already (its codes are replaced, its branch is kept up to date).
        name: the parameter.
        weight: its float values in the original layout.
        recipe: of the method.
        where: the module's full name, for messages.
        outcome: receives the error and, with ``adapter_rank``, the factors of an adapter.
        iterations: of rounding and low-rank factors in turns, where the layer has some.

    Raises:
        QuantizationError: the recipe refused the weight, or the rank exceeds it.
    """
    rank = module.layer_spec.low_rank or adapter_rank
    compensation = Compensation({where: rank}, iterations=iterations)
    try:
        matrix = module.to_matrix(name, weight)
        target = compensation.target(module.without_exact(name, matrix), module, name, where, recipe.rounding, None)
        packed = recipe.rounding(target, module.layer_spec.weight)
        if module.layer_spec.exact is not None:  # a merged weight: what was kept exact stays so
            module.fit_exact(name, matrix, decode(packed))
    except ValueError as problem:
        raise QuantizationError(f"{where}.{name}: {problem}") from None
    done = pack_parameter(module, name, weight, packed, where, adapter_rank)
    outcome.errors[f"{where}.{name}"] = done.error
    if done.adapter is not None:
        outcome.adapters[where] = done.adapter
    outcome.original_bits = weight.element_size() * 8


@torch.no_grad()
def pack_parameter(
    module: PackedModule,
    name: str,
    weight: Tensor,
    packed: PackedTensor,
    where: str,
    adapter_rank: int = 0,
    weighting: Weighting = None,
    factors: tuple[Tensor, Tensor] | None = None,
) -> PackedParameter:
    """Put a packed parameter in the place of a float one, with the low-rank part of its error.

    The packed tensor's specification becomes the layer's: a rounding may complete it (an exponent that it searched).

    Args:
        weighting: of the layer's inputs, with which the low-rank part is solved for; of a stack, one for each matrix.
            As the transform leaves them, where the layer has a branch; as they come, for an adapter.
        factors: A and B of a branch that are stored instead.

    Returns:
        The relative error, branch included, and with ``adapter_rank`` the adapter's factors.

    Raises:
        QuantizationError: shapes that are not the layer's, or a rank that exceeds the matrix.
    """
    matrix = module.to_matrix(name, weight)
    if (kept := _float_weights.get()) is not None:
        kept[f"{where}.{name}"] = module.from_matrix(name, matrix).clone()
    adapter = None
    try:
        if packed.spec != module.layer_spec.weight:
            module.layer_spec = replace(module.layer_spec, weight=packed.spec)
        spec, branches = module.layer_spec, module.branches(name)
        if spec.low_rank and factors is not None:
            module.set_low_rank_factors(name, *encoded_factors(*factors, spec.factor_bits, branches))
        elif spec.low_rank:
            difference = _difference(module, name, matrix, packed)
            solved = stacked_factors(difference, spec.low_rank, spec.factor_bits, branches, weighting)
            module.set_low_rank_factors(name, *solved)
        elif factors is not None:
            raise ValueError("its method has low-rank factors for it, and its specification no low_rank")
        elif adapter_rank:
            difference = _difference(module, name, matrix, packed)
            if spec.transform is not None:  # an adapter reads the input as it comes
                difference = spec.transform.folded(difference, module.transform_tensors(name))
            assert weighting is None or isinstance(weighting, Tensor)
            adapter = low_rank_factors(difference, adapter_rank, weighting)
        module.set_packed(name, packed)
        error = _error(module, name, matrix, packed)
    except ValueError as problem:
        raise QuantizationError(f"{where}.{name}: {problem}") from None
    return PackedParameter(error, adapter)


def _difference(module: PackedModule, name: str, matrix: Tensor, packed: PackedTensor) -> Tensor:
    """What codes and exact part leave of a weight."""
    return matrix.float() - module.with_exact(name, decode(packed))


def _error(module: PackedModule, name: str, matrix: Tensor, packed: PackedTensor) -> float:
    factors = module.low_rank_factors(name, torch.float32)
    if factors is None and module.layer_spec.exact is None:
        return relative_error(matrix, packed)
    difference = _difference(module, name, matrix, packed)
    if factors is not None:
        difference -= expand_low_rank(*factors, module.branches(name))
    norm = matrix.float().norm().item()
    return difference.norm().item() / norm if norm else 0.0
