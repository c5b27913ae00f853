"""LearnedWeight: one weight whose quantization is trained, whatever it is that is learned."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from hf_lowbit.formats import NumberFormat, PackedTensor, WeightSpec, unpack_codes
from hf_lowbit.formats.packed import table_of
from hf_lowbit.rounding.codebook import fit_codebook
from hf_lowbit.rounding.grid import Grid, RoundingError
from hf_lowbit.rounding.learned.levels import Levels
from hf_lowbit.rounding.learned.ranges import base_grid
from hf_lowbit.rounding.store import to_packed


class LearnedWeight(nn.Module, ABC):
    """A float weight and what is learned about its quantization, for training against the outputs of a layer or block.

    The weight itself never changes. Scales are rounded to their stored type in :meth:`forward` already (with
    straight-through gradients), so that what was trained is what :meth:`pack` stores.

    A training step: ``anneal_(progress)``, forward, loss + ``regularizer(progress)``, backward, optimizer step,
    ``constrain_()``.

    Attributes:
        weight: float32 ``[n, groups, g]``, the weight split into what shares a scale; n is rows, or 1.
        levels: the values of the number format.
    """

    weight: Tensor
    base_scale: Tensor
    base_zero_point: Tensor

    def __init__(self, weight: Tensor, spec: WeightSpec, start: PackedTensor | None = None) -> None:
        """Args:
            weight: ``[rows, columns]``, read as float32.
            spec: format and granularity of the result.
            start: the same weight quantized by other means (GPTQ, say): its grid is where learning starts.

        Raises:
            RoundingError: weights that are not a finite matrix, a start of another shape or spec, or a power format
                without an exponent.
        """
        super().__init__()
        if weight.dim() != 2:
            raise RoundingError(f"learned rounding takes one matrix at a time, not a tensor of shape {[*weight.shape]}")
        if start is not None and (start.spec != spec or (len(start.weight), start.columns) != tuple(weight.shape)):
            raise RoundingError(f"start must be this weight ({[*weight.shape]}) quantized with this spec ({spec.json})")
        if spec.is_open:
            what = "a split of exponent and mantissa" if spec.format == "fp" else "an exponent"
            raise RoundingError(f"learned rounding starts from {what}: search one first, or give it")
        self.spec = spec
        self.shape = weight.shape
        exact = weight.detach().float()
        groups = spec.groups(weight.shape[1])
        grouped = exact.reshape(1, 1, -1) if spec.group_size == "tensor" else exact.reshape(len(exact), groups, -1)
        self.register_buffer("weight", grouped, persistent=False)
        self.table = _table_to_store(exact, spec, start)
        self.number_format = (
            spec.number_format if self.table is None else NumberFormat("codebook", spec.bits, self.table)
        )
        self.levels = Levels(self.number_format, weight.device)
        grid = base_grid(grouped, spec, self.number_format, start)
        self.register_buffer("base_scale", grid.scale, persistent=False)
        self.register_buffer("base_zero_point", grid.zero_point, persistent=False)

    @abstractmethod
    def forward(self) -> Tensor:
        """The simulated quantized weight, float32 ``[rows, columns]``, differentiable in what is learned."""

    @abstractmethod
    def final(self) -> tuple[Tensor, Grid]:
        """Index of each weight's level, integer ``[n, groups, g]``, and scale and zero point as stored."""

    @abstractmethod
    def parameter_groups(self) -> list[dict[str, Any]]:
        """``{"params": [...], "lr_scale": float}`` for each set of parameters with its own share of the rate."""

    def regularizer(self, progress: float) -> Tensor:
        """A scalar to be added to the loss; ``progress`` runs from 0 to 1 over the training."""
        return self.weight.new_zeros(())

    def anneal_(self, progress: float) -> None:
        """Called before each forward pass in training: harden what is soft."""

    @torch.no_grad()
    def constrain_(self) -> None:
        """Put parameters that an optimizer step moved out of their bounds back."""

    @property
    def result_spec(self) -> WeightSpec:
        """The spec to store: that given, unless learning changes it."""
        return self.spec

    @torch.no_grad()
    def hard(self) -> Tensor:
        """The weight that :meth:`pack` decodes to, float32 ``[rows, columns]``. Raises as it does."""
        index, grid = self._checked()
        values = self.levels.values[index] - grid.zero_point.unsqueeze(-1)
        return self.ungrouped(values * grid.scale.unsqueeze(-1))

    @torch.no_grad()
    def pack(self) -> PackedTensor:
        """The learned weight as it is stored. Raises RoundingError where training diverged."""
        index, grid = self._checked()
        codes = self.ungrouped(self.levels.codes[index])
        return to_packed(codes, grid, self.result_spec, self.number_format, self.table)

    def _checked(self) -> tuple[Tensor, Grid]:
        if not any(bool(parameter.isnan().any()) for parameter in self.parameters()):
            index, grid = self.final()
            if all(bool(torch.isfinite(tensor).all()) for tensor in grid):
                return index, grid
        raise RoundingError("learned rounding diverged to NaN or infinite values: lower the learning rate")

    def ungrouped(self, tensor: Tensor) -> Tensor:
        """``[n, groups, g]`` as ``[rows, columns]``."""
        return tensor.reshape(self.shape)

    def extra_repr(self) -> str:
        return f"{[*self.shape]}, {self.spec.json}"


def positions_of(start: PackedTensor, levels: Levels, number_format: NumberFormat, like: Tensor) -> Tensor:
    """Level of each weight of a packed tensor, shaped like grouped weights."""
    codes = unpack_codes(start.weight, start.spec.bits, start.columns, start.spec.packing)
    return levels.position_of_code(codes, number_format).reshape(like.shape)


def _table_to_store(weight: Tensor, spec: WeightSpec, start: PackedTensor | None) -> Tensor | None:
    if not spec.has_fitted_table:
        return None
    return (fit_codebook(weight, spec) if start is None else table_of(start)).cpu()
