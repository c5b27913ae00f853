"""What packed modules have for quantized inputs: the scales that are stored, and the product that reads them."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hf_lowbit.formats import PackedTensor
from hf_lowbit.kernels import packed_linear
from hf_lowbit.nn.row_sums import RowSums
from hf_lowbit.nn.spec import LayerSpec
from hf_lowbit.nn.timestep import rows_now

INPUT_SCALE, INPUT_SHIFT = "_input_scale", "_input_shift"  # after the name of a parameter


class QuantizedInputs(nn.Module):
    """Part of :class:`hf_lowbit.nn.PackedModule`.

    Static inputs of a parameter have scales, ``<name>_input_scale`` ``[(timesteps,) groups]``, and where their codes
    have a shift ``<name>_input_shift`` of the same shape: float32 as its int32 bit pattern, repeated for each expert
    and each of its stacked projections, so that these can be split and merged like everything else of theirs. Until
    they are set, inputs are quantized by the range of each call.
    """

    layer_spec: LayerSpec
    backend: str | None
    _row_sums: RowSums | None = None

    @property
    def has_static_inputs(self) -> bool:
        """Whether inputs are quantized with a scale that is stored."""
        return self.layer_spec.activation is not None and self.layer_spec.activation.static

    def input_table(self, name: str = "weight", expert: int | None = None) -> tuple[Tensor | None, Tensor | None]:
        """Stored scales and shifts, float32 ``[(timesteps,) groups]``; None where there are none, or not yet."""
        if not self.has_static_inputs:
            return None, None
        return self._stored_inputs(name, INPUT_SCALE, expert), self._stored_inputs(name, INPUT_SHIFT, expert)

    def input_scales(
        self, name: str, leading: Sequence[int], expert: int | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Scales and shifts for an input, float32 ``[groups]``; ``[tokens, groups]`` where its timesteps differ.

        Args:
            leading: the input's dimensions but the last.

        Raises:
            UnknownTimestepError: they are of timesteps, and that of the model is not known.
        """
        scale, shift = self.input_table(name, expert)
        activation = self.layer_spec.activation
        if scale is None or activation is None or activation.timesteps is None:
            return scale, shift
        rows = rows_now(activation.timesteps, leading[0] if leading else 1)
        if isinstance(rows, Tensor):
            rows = rows.to(scale.device).repeat_interleave(math.prod(leading[1:]))
        return scale[rows], None if shift is None else shift[rows]

    def input_scale(self, name: str = "weight", expert: int | None = None) -> Tensor | None:
        """The stored scales, without the shifts."""
        return self.input_table(name, expert)[0]

    @torch.no_grad()
    def set_input_scale(self, name: str, scale: Tensor, shift: Tensor | None = None) -> None:
        """Store the scales of a parameter's static inputs, and their shifts, float32 ``[(timesteps,) groups]``.

        Raises:
            ValueError: other shapes, a shift that is missing or not wanted, or values that cannot be.
        """
        activation = self.layer_spec.activation
        if activation is None or (shift is not None) != activation.has_shift:
            raise ValueError(f"inputs of {activation} have {'a' if shift is None else 'no'} shift")
        if not is_scale(scale):
            raise ValueError(f"the scales of the inputs of {name} must be finite and positive, not {scale.tolist()}")
        if shift is not None and not bool(torch.isfinite(shift).all()):
            raise ValueError(f"the shifts of the inputs of {name} must be finite, not {shift.tolist()}")
        given = {f"{name}{INPUT_SCALE}": scale, f"{name}{INPUT_SHIFT}": shift}
        device, table = getattr(self, name).device, self.input_shape(name)
        for key, (shape, dtype) in self.input_companions(name).items():
            tensor = given[key]
            assert tensor is not None
            if tensor.numel() != math.prod(table):
                raise ValueError(f"{key} has the shape {list(table)}, not {list(tensor.shape)}")
            own = tensor.detach().to(device, torch.float32).reshape(table)
            repeated = own.expand(*self._repeats(name), *table).reshape(shape).clone()
            setattr(self, key, nn.Parameter(repeated.view(dtype), requires_grad=False))

    @abstractmethod
    def matrix_shape(self, name: str) -> tuple[tuple[int, ...], int]:
        """See :class:`hf_lowbit.nn.PackedModule`."""

    @abstractmethod
    def branches(self, name: str) -> int:
        """See :class:`hf_lowbit.nn.PackedModule`."""

    @abstractmethod
    def packed(self, name: str = "weight") -> PackedTensor:
        """See :class:`hf_lowbit.nn.PackedModule`."""

    def input_shape(self, name: str) -> tuple[int, ...]:
        """Of the scales of one matrix, ``[(timesteps,) groups]``."""
        activation = self.layer_spec.activation
        assert activation is not None
        groups = activation.groups(self.matrix_shape(name)[1])
        return (groups,) if activation.timesteps is None else (len(activation.timesteps), groups)

    def input_companions(self, name: str) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Parameter name -> (shape, dtype) of what is stored for the inputs of ``name``."""
        activation = self.layer_spec.activation
        if activation is None or not activation.static:
            return {}
        table, repeats = self.input_shape(name), self._repeats(name)
        shape = repeats if repeats and table == (1,) else (*repeats, *table)
        suffixes = (INPUT_SCALE, INPUT_SHIFT) if activation.has_shift else (INPUT_SCALE,)
        return {f"{name}{suffix}": (shape, torch.int32) for suffix in suffixes}

    def input_problem(self, name: str) -> str | None:
        """What is wrong with what is stored for the inputs of ``name``, if anything is."""
        for key in self.input_companions(name):
            stored = getattr(self, key)
            if stored.device.type == "meta":
                continue
            values = stored.view(torch.float32)
            if key.endswith(INPUT_SCALE) and not is_scale(values):
                return f"{key} holds values that are not finite and positive"
            if not bool(torch.isfinite(values).all()):
                return f"{key} holds NaN or infinite values"
        return None

    def _repeats(self, name: str) -> tuple[int, ...]:
        """What a table is repeated for: the experts and stacked projections; nothing in other layers."""
        (*experts, _), _ = self.matrix_shape(name)
        return (*experts, self.branches(name)) if experts else ()

    def _stored_inputs(self, name: str, suffix: str, expert: int | None) -> Tensor | None:
        stored = self._parameters.get(f"{name}{suffix}")
        if stored is None:
            return None
        own = stored if expert is None else stored[expert, 0]  # of the first of its projections, like the others
        return own.view(torch.float32) if own.dim() else own.view(torch.float32).reshape(1)

    def row_sums(self, name: str = "weight", expert: int | None = None) -> Tensor | None:
        """:func:`hf_lowbit.kernels.row_sums` of the codes of a parameter; None where inputs have no shift."""
        activation = self.layer_spec.activation
        if activation is None or not activation.has_shift:
            return None
        if self._row_sums is None:
            self._row_sums = RowSums()
        sums = self._row_sums.of_packed(name, self.packed(name), activation.groups(self.matrix_shape(name)[1]))
        return sums if expert is None else sums[expert]

    def multiply(self, x: Tensor, packed: PackedTensor, name: str = "weight", expert: int | None = None) -> Tensor:
        """x ``[..., columns]`` times the codes of a parameter, or some rows of them, or those of an expert."""
        activation = self.layer_spec.activation
        if activation is None or not (activation.static or activation.has_shift):
            return packed_linear(x, packed, activation, self.backend)
        scale, shift = self.input_scales(name, x.shape[:-1], expert)
        sums = self.row_sums(name, expert)
        if sums is not None and len(sums) != packed.weight.shape[0]:
            sums = None  # of some rows: a convolution of several groups
        return packed_linear(x, packed, activation, self.backend, scale, shift, sums)


def is_scale(scale: Tensor) -> bool:
    """Whether floats are finite and positive."""
    return bool((torch.isfinite(scale) & (scale > 0)).all())
