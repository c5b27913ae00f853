"""How far the native kernels are from the reference, layer by layer."""

from __future__ import annotations

import copy
from typing import Any

import torch

from hf_lowbit.plan import packed_modules
from tests.matrix.models import TinyModel


def errors_of_layers(tiny: TinyModel, native: Any, reference: Any) -> dict[str, float]:
    """Packed layer -> relative norm of its output less the reference backend's, on what it reads in the native model.

    Whole models cannot be compared so closely: a code of an input that tips over would change all after it.
    """
    twins, errors = packed_modules(reference), {}
    expected: dict[str, torch.Tensor] = {}
    for module in twins.values():
        module.backend = "reference"

    def run_twin(name: str, args: Any, kwargs: Any) -> None:
        expected[name] = twins[name](*copy.deepcopy(args), **copy.deepcopy(kwargs)).double()

    def compare(name: str, output: torch.Tensor) -> None:
        errors[name] = float((output.double() - expected[name]).norm() / expected[name].norm())

    for name, module in packed_modules(native).items():
        module.register_forward_pre_hook(lambda _, args, kwargs, n=name: run_twin(n, args, kwargs), with_kwargs=True)
        module.register_forward_hook(lambda _, args, output, n=name: compare(n, output))
    tiny.run(native)
    assert errors
    return errors
