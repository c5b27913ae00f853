"""TrainedLayers: weights, biases and stored input scales of packed layers as something that a gradient can reach."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_lowbit.formats import ActivationSpec, PackedTensor
from hf_lowbit.kernels import decode_matrix
from hf_lowbit.nn import PackedModule
from hf_lowbit.nn.timestep import rows_now
from hf_lowbit.plan import packed_modules
from hf_lowbit.rounding.learned import RebasedRounding
from hf_lowbit.training.step_size import quantize_with_steps
from hf_lowbit.training.straight_through import simulate_activation

_LEAST_SHARE = 0.1  # [ours] of the step that an input had: one that went below zero would never come back


class TrainedLayers:
    """Packed layers of one matrix each, computing as their codes do, and differentiably.

    Weights are trained by re-based rounding (:class:`hf_lowbit.rounding.learned.RebasedRounding`), biases as they are,
    the scales of static integer inputs as step sizes; zero points stay. What is not trained keeps its values, but
    gradients pass through it. Decoded, the weights of all layers are in memory meanwhile. Layers with static inputs of
    other formats compute as they do without it. The timestep is the context's (:mod:`hf_lowbit.nn.timestep`).

    Attributes:
        layers: name -> the layer.
    """

    def __init__(
        self, model: nn.Module, weights: Collection[str], biases: Collection[str], inputs: Collection[str]
    ) -> None:
        """Args:
        model: packed, its floats in float32.
        weights, biases, inputs: names of the layers of which each is trained; those that have none are left out.
        """
        self.layers = {
            name: _TrainedLayer(layer, name in weights, name in biases, name in inputs)
            for name, layer in packed_modules(model).items()
            if _is_differentiable(layer)
        }

    @property
    def weights(self) -> list[nn.Parameter]:
        """The trained weights' values."""
        return [layer.weight.values for layer in self.layers.values() if layer.weight is not None]

    @property
    def biases(self) -> list[nn.Parameter]:
        """The trained biases: the model's own parameters."""
        return [layer.bias for layer in self.layers.values() if layer.bias is not None]

    @property
    def steps(self) -> list[nn.Parameter]:
        """The trained scales, one parameter ``[groups]`` for each timestep of each layer."""
        return [step for layer in self.layers.values() if layer.trains_steps for step in layer.steps]

    @property
    def trained(self) -> list[nn.Parameter]:
        """All of them."""
        return [*self.weights, *self.biases, *self.steps]

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within it the layers multiply by their weights and read their inputs as they are trained now."""
        try:
            for layer in self.layers.values():
                layer.layer.multiply = layer  # type: ignore[method-assign]
            yield
        finally:
            for layer in self.layers.values():
                layer.layer.__dict__.pop("multiply", None)

    @torch.no_grad()
    def constrain_(self) -> None:
        """Put steps that an optimizer moved out of their bounds back."""
        for layer in self.layers.values():
            layer.constrain_()

    @torch.no_grad()
    def store(self) -> None:
        """Give the layers their weights and scales as they are now. Raises RoundingError where training diverged."""
        for layer in self.layers.values():
            layer.store()


class _TrainedLayer:
    """In the place of :meth:`PackedModule.multiply`."""

    def __init__(self, layer: PackedModule, weight: bool, bias: bool, inputs: bool) -> None:
        self.layer = layer
        packed, own_bias = layer.packed(), getattr(layer, "bias", None)
        self.weight = RebasedRounding(packed) if weight and getattr(layer, "groups", 1) == 1 else None
        self.bias = own_bias if bias else None
        self._decoded = None if self.weight is not None else decode_matrix(packed, torch.float32, layer.backend)
        self.activation = layer.layer_spec.activation
        scale, shift = layer.input_table()
        self.trains_steps = inputs and scale is not None
        self.steps: list[nn.Parameter] = []
        if scale is not None and self.activation is not None:
            limit = 2.0 ** (self.activation.bits - 1)
            table = scale if scale.dim() == 2 else scale.unsqueeze(0)
            self._zero = torch.zeros_like(table) if shift is None else (shift.reshape(table.shape) / table).round()
            self._first, self._last = self._zero - limit + self.activation.symmetric, self._zero + limit - 1
            self._least = _LEAST_SHARE * table
            self.steps = [nn.Parameter(row.clone(), requires_grad=self.trains_steps) for row in table]

    def __call__(self, x: Tensor, packed: PackedTensor, name: str = "weight", expert: int | None = None) -> Tensor:
        weight = self._decoded if self.weight is None else self.weight()
        if weight is None or len(weight) != len(packed.weight):  # some rows, of a convolution of several groups
            weight = decode_matrix(packed, torch.float32, self.layer.backend)
        return F.linear(self._read(x), weight)

    def _read(self, x: Tensor) -> Tensor:
        if not self.steps or self.activation is None:
            return x if self.activation is None else simulate_activation(x, self.activation)
        times = self.activation.timesteps
        row = 0 if times is None else rows_now(times, len(x))
        if not isinstance(row, int):
            raise ValueError("samples of different timesteps are trained on one after the other, not in one batch")
        return quantize_with_steps(x, self.steps[row], self._first[row], self._last[row])

    def constrain_(self) -> None:
        if self.trains_steps:
            for step, least in zip(self.steps, self._least, strict=True):
                step.copy_(torch.maximum(step, least))

    def store(self) -> None:
        if self.weight is not None:
            self.layer.set_packed("weight", self.weight.pack())
        if self.trains_steps and self.activation is not None:
            scale = torch.stack([step.detach() for step in self.steps])
            self.layer.set_input_scale("weight", scale, scale * self._zero if self.activation.has_shift else None)


def _is_differentiable(layer: PackedModule) -> bool:
    """Whether it has one matrix, and inputs that :class:`_TrainedLayer` can read."""
    activation = layer.layer_spec.activation
    is_matrix = layer.packed_parameters == ("weight",) and layer.packed().weight.dim() == 2
    return is_matrix and layer.kind != "embedding" and (activation is None or _is_integer(activation))


def _is_integer(activation: ActivationSpec) -> bool:
    return activation.format == "int" or not activation.static
