"""The matrices of a layer that are quantized, and what each of them reads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from hf_lowbit.calibration.experts import expert_inputs
from hf_lowbit.calibration.statistics import Hessian
from hf_lowbit.formats import WeightSpec
from hf_lowbit.nn import KINDS, LayerSpec, PackedLinear, PackedModule


@dataclass(frozen=True)
class Matrix:
    """One matrix to be quantized.

    Attributes:
        key: its name within the block, "self_attn.q_proj.weight"; of an expert, "mlp.experts.down_proj[3]".
        layer: name of its module within the block; "" where the block is the layer.
        parameter: of that module.
        expert: which of a stack of experts; None for ordinary layers.
        skeleton: the packed module that will take the layer's place, its parameters still the float ones.
    """

    key: str
    layer: str
    parameter: str
    expert: int | None
    skeleton: PackedModule

    @property
    def spec(self) -> WeightSpec:
        """How it is to be stored."""
        return self.skeleton.layer_spec.weight

    @property
    def layer_spec(self) -> LayerSpec:
        """The layer's whole specification, activations included."""
        return self.skeleton.layer_spec

    @property
    def weight(self) -> Tensor:
        """The float values now, ``[rows, columns]``: a view of the layer's parameter."""
        matrix = self.skeleton.to_matrix(self.parameter, getattr(self.skeleton, self.parameter).detach())
        return matrix if self.expert is None else matrix[self.expert]


def matrices_of(layer: str, module: nn.Module, kind: str, spec: LayerSpec) -> list[Matrix]:
    """Every matrix of a float layer."""
    skeleton = KINDS[kind].from_float(module, spec)
    prefix = f"{layer}." if layer else ""
    found: list[Matrix] = []
    for parameter in skeleton.packed_parameters:
        leading, _ = skeleton.matrix_shape(parameter)
        if len(leading) == 1:
            found.append(Matrix(f"{prefix}{parameter}", layer, parameter, None, skeleton))
        else:
            found += [
                Matrix(f"{prefix}{parameter}[{expert}]", layer, parameter, expert, skeleton)
                for expert in range(leading[0])
            ]
    return found


def why_without_inputs(matrix: Matrix) -> str | None:
    """Why a matrix has no inputs to calibrate on; None if it has."""
    module = matrix.skeleton
    if module.kind == "embedding":
        return "an embedding looks rows up: it has no inputs to calibrate on"
    if getattr(module, "groups", 1) != 1:
        return "a convolution of several groups has no one input matrix"
    return None


def as_read(matrix: Matrix, statistic: Hessian) -> Tensor:
    """The mean of x x^T over what the matrix multiplies: the transformed input, where its layer transforms it."""
    hessian, layer = statistic.matrix, matrix.skeleton
    if not isinstance(layer, PackedLinear) or layer.layer_spec.transform is None:
        return hessian
    mixed = layer.transformed(layer.transformed(hessian).t())
    return (mixed + mixed.t()) / 2


def inputs_of(module: nn.Module, kind: str, args: Any, kwargs: Any) -> Iterator[tuple[str, int | None, Tensor]]:
    """(parameter, expert, float32 inputs ``[tokens, columns]``) of a float layer's call."""
    if kind == "experts":
        for parameter, expert, x in expert_inputs(module, args, kwargs):
            yield parameter, expert, x.float()
        return
    x = args[0] if args else next(iter(kwargs.values()))
    if kind in ("conv1d", "conv2d"):
        yield "weight", None, _unfolded(module, x)
    else:
        yield "weight", None, x.reshape(-1, x.shape[-1]).float()


def _unfolded(module: Any, x: Tensor) -> Tensor:
    """What each output position of a convolution reads, ``[positions, in * kernel]``."""
    kernel, stride, dilation = module.kernel_size, module.stride, module.dilation
    if module.padding_mode != "zeros" or isinstance(module.padding, str):
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x = F.pad(x, module._reversed_padding_repeated_twice, mode)
        padding: tuple[int, ...] = (0,) * len(kernel)
    else:
        padding = tuple(module.padding)
    if len(kernel) == 1:
        x, kernel, stride, dilation = x.unsqueeze(-2), (1, *kernel), (1, *stride), (1, *dilation)
        padding = (0, *padding)
    columns = F.unfold(x.float(), kernel, dilation, padding, stride)
    return columns.transpose(1, 2).reshape(-1, columns.shape[1])
