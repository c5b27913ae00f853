"""What packed modules have for quantized inputs: the scales that are stored, and the product that reads them."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn

from hf_lowbit.formats import PackedTensor
from hf_lowbit.kernels import packed_linear
from hf_lowbit.nn.spec import LayerSpec

INPUT_SCALE = "_input_scale"  # after the name of a parameter


class QuantizedInputs(nn.Module):
    """Part of :class:`hf_lowbit.nn.PackedModule`.

    Static inputs of a parameter have one scale, ``<name>_input_scale``: float32 as its int32 bit pattern, repeated for
    each expert and each of its stacked projections, so that these can be split and merged like everything else of
    theirs. Until it is set, inputs are quantized by the largest of each call.
    """

    layer_spec: LayerSpec
    backend: str | None

    @property
    def has_static_inputs(self) -> bool:
        """Whether inputs are quantized with a scale that is stored."""
        return self.layer_spec.activation is not None and self.layer_spec.activation.static

    def input_scale(self, name: str = "weight", expert: int | None = None) -> Tensor | None:
        """float32 ``[1]``; None where inputs are not static, or the scale is not known yet."""
        stored = self._parameters.get(f"{name}{INPUT_SCALE}") if self.has_static_inputs else None
        if stored is None:
            return None
        return (stored if expert is None else stored[expert]).view(torch.float32)[:1]

    @torch.no_grad()
    def set_input_scale(self, name: str, scale: Tensor) -> None:
        """Store the scale of a parameter's static inputs, a float32 scalar.

        Raises:
            ValueError: it is not finite and positive.
        """
        if not is_scale(scale):
            raise ValueError(f"the scale of the inputs of {name} must be finite and positive, not {float(scale)}")
        device = getattr(self, name).device
        for key, (shape, dtype) in self.input_companions(name).items():
            repeated = torch.full(shape, float(scale), dtype=torch.float32, device=device)
            setattr(self, key, nn.Parameter(repeated.view(dtype), requires_grad=False))

    @abstractmethod
    def input_companions(self, name: str) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Parameter name -> (shape, dtype) of what is stored for the inputs of ``name``."""

    def input_problem(self, name: str) -> str | None:
        """What is wrong with the stored scale of the inputs of ``name``, if anything is."""
        for key in self.input_companions(name):
            stored = getattr(self, key)
            if stored.device.type != "meta" and not is_scale(stored.view(torch.float32)):
                return f"{key} holds values that are not finite and positive"
        return None

    def multiply(self, x: Tensor, packed: PackedTensor, name: str = "weight", expert: int | None = None) -> Tensor:
        """x ``[..., columns]`` times the codes of a parameter, or some rows of them, or those of an expert."""
        return packed_linear(x, packed, self.layer_spec.activation, self.backend, self.input_scale(name, expert))


def is_scale(scale: Tensor) -> bool:
    """Whether floats are finite and positive."""
    return bool((torch.isfinite(scale) & (scale > 0)).all())
