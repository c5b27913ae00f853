"""PackedModule: a module whose weights are codes and companions instead of floats."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn

from hf_lowbit.formats import PackedTensor, SpecError
from hf_lowbit.formats.packed import from_bits
from hf_lowbit.kernels import decode_matrix
from hf_lowbit.nn.exact import ExactSpec
from hf_lowbit.nn.factors import FACTOR_DTYPE, expand_low_rank, factor_shapes, read_factors, stored_factors
from hf_lowbit.nn.inputs import INPUT_SCALE, INPUT_SHIFT, QuantizedInputs
from hf_lowbit.nn.spec import LayerSpec
from hf_lowbit.nn.transforms import TransformSpec

_Module = TypeVar("_Module", bound=nn.Module)


class CorruptWeightError(ValueError):
    """Stored tensors that contradict the specification or hold values that cannot be."""


class PackedModule(QuantizedInputs):
    """Base of the packed modules.

    A packed parameter keeps its original name and becomes int32 codes; companions stand beside it as
    ``<name>_scale``, ``<name>_zero_point``, ``<name>_table``, ``<name>_input_scale``, ``<name>_input_shift``,
    ``<name>_low_rank_<part>`` and, in a layer with a transform or an exact part, ``<name>_transform_<part>`` and
    ``<name>_exact_<part>``. All are integer parameters without gradient (floats as bit patterns), which no cast,
    ``.half()`` or ``.to(dtype)`` changes. Until :meth:`set_packed` is called the parameter is the original float one
    ("unpacked"): that is the state in which a checkpoint of floats is loaded.

    Attributes:
        kind: the name under which plans refer to the class.
        packed_parameters: the parameters that are packed.
        takes_transform, takes_exact, takes_constant_token: whether the kind can have a transform, an exact part, and a
            first token whose product is stored.
        layer_spec: formats of weights and activations.
        backend: one of :data:`hf_lowbit.kernels.BACKENDS` to force it; None takes the best for each product.
    """

    kind: ClassVar[str]
    packed_parameters: ClassVar[tuple[str, ...]] = ("weight",)
    takes_transform: ClassVar[bool] = False
    takes_exact: ClassVar[bool] = False
    takes_constant_token: ClassVar[bool] = False
    layer_spec: LayerSpec
    backend: str | None = None

    @classmethod
    @abstractmethod
    def from_float(cls, module: nn.Module, spec: LayerSpec) -> PackedModule:
        """A packed module in the unpacked state, sharing the float module's parameters.

        Raises:
            TypeError: the kind does not pack such a module.
        """

    @abstractmethod
    def to_float(self, dtype: torch.dtype) -> nn.Module:
        """The ordinary module with dequantized weights, low-rank branch included."""

    @abstractmethod
    def matrix_shape(self, name: str) -> tuple[tuple[int, ...], int]:
        """((rows,) or (experts, rows), columns) of a parameter seen as a matrix that maps columns to rows."""

    def to_matrix(self, name: str, weight: Tensor) -> Tensor:
        """The parameter in its original layout as the matrix ``[..., rows, columns]`` that is packed.

        That of a layer with a transform is rewritten for it.
        """
        return weight

    def from_matrix(self, name: str, matrix: Tensor) -> Tensor:
        """Inverse of :meth:`to_matrix`, a transform folded in: an ordinary layer with it computes the same.

        (Merged channels stay merged: of a transform that loses something it is the inverse on what is left.)
        """
        return matrix

    def branches(self, name: str) -> int:
        """Stacked projections of a parameter that have a low-rank branch each (gate and up: 2)."""
        return 1

    def companion_shapes(self, name: str) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Parameter name -> (shape, dtype) of everything stored for ``name``, the codes included."""
        leading, columns = self.matrix_shape(name)
        stored = {
            f"{name}{suffix}": value for suffix, value in self.layer_spec.weight.companions(leading, columns).items()
        }
        if rank := self.layer_spec.low_rank:
            parts = factor_shapes(leading, columns, rank, self.branches(name), self.layer_spec.factor_bits)
            stored |= {f"{name}_low_rank_{part}": value for part, value in parts.items()}
        stored |= self.input_companions(name)
        if transform := self.layer_spec.transform:
            if not self.takes_transform:
                raise SpecError(f"layers of kind {self.kind!r} cannot have a transform")
            parts = transform.companions(leading[0], columns)
            stored |= {f"{name}_transform_{part}": value for part, value in parts.items()}
        if exact := self.layer_spec.exact:
            if not self.takes_exact:
                raise SpecError(f"layers of kind {self.kind!r} cannot have an exact part")
            stored |= {f"{name}_exact_{part}": value for part, value in exact.companions(leading[0], columns).items()}
        return stored

    def allocate(self, name: str, packed: bool) -> None:
        """Create empty companions on the parameter's device; with ``packed`` also empty codes in its place."""
        device = getattr(self, name).device
        for key, (shape, dtype) in self.companion_shapes(name).items():
            if key != name or packed:
                setattr(self, key, frozen(torch.empty(shape, dtype=dtype, device=device)))

    def is_packed(self, name: str = "weight") -> bool:
        """False while the parameter is still the float one."""
        return not getattr(self, name).is_floating_point()

    def packed(self, name: str = "weight") -> PackedTensor:
        """The parameter's codes and companions."""
        stored = self._parameters  # its own attribute lookup costs as much as a small product
        weight, scale = stored[name], stored[f"{name}_scale"]
        assert weight is not None and scale is not None
        zero_point, table = stored.get(f"{name}_zero_point"), stored.get(f"{name}_table")
        spec, columns = self.layer_spec.weight, self.matrix_shape(name)[1]
        if spec.scale_bits is None:
            return PackedTensor(weight, scale, spec, columns, zero_point, table)
        ranges = stored[f"{name}_scale_range"], stored.get(f"{name}_zero_point_range")
        return PackedTensor(weight, scale, spec, columns, zero_point, table, *ranges)

    @torch.no_grad()
    def set_packed(self, name: str, packed: PackedTensor) -> None:
        """Replace the parameter by a packed tensor. Raises ValueError when its shapes are not the layer's."""
        shapes = self.companion_shapes(name)
        for suffix, tensor in packed.tensors().items():
            key = f"{name}{suffix}"
            if shapes[key] != (tuple(tensor.shape), tensor.dtype):
                raise ValueError(f"{key} is {tuple(tensor.shape)} {tensor.dtype}, expected {shapes[key]}")
            setattr(self, key, frozen(tensor))
        self._row_sums = None

    def low_rank_factors(self, name: str, dtype: torch.dtype, index: int | None = None) -> tuple[Tensor, Tensor] | None:
        """A ``[..., branches * rank, columns]`` and B ``[..., rows, rank]``, or None without a branch.

        ``index``: those of one matrix of a stack.
        """
        if not self.layer_spec.low_rank:
            return None
        parts = self._parts(f"{name}_low_rank_")
        if index is not None:
            parts = {part: tensor[index] for part, tensor in parts.items()}
        (*_, rows), columns = self.matrix_shape(name)
        a, b = read_factors(parts, rows, columns, self.branches(name), self.layer_spec.factor_bits)
        return a.to(dtype), b.to(dtype)

    @torch.no_grad()
    def set_low_rank_factors(self, name: str, a: Tensor | PackedTensor, b: Tensor | PackedTensor) -> None:
        """Store the branch: A and B, floats or codes (:data:`hf_lowbit.nn.factors.Factors`).

        Raises:
            ValueError: shapes or types that are not the layer's.
        """
        shapes = self.companion_shapes(name)
        stored = {f"{name}_low_rank_{part}": tensor for part, tensor in stored_factors((a, b)).items()}
        for key, tensor in stored.items():
            if (tuple(tensor.shape), tensor.dtype) != shapes.get(key):
                raise ValueError(f"{key} is {tuple(tensor.shape)} {tensor.dtype}, expected {shapes.get(key)}")
            setattr(self, key, frozen(tensor))

    def transform_tensors(self, name: str = "weight") -> dict[str, Tensor]:
        """Part -> tensor of the transform, as stored; empty without one."""
        return self._parts(f"{name}_transform_")

    @torch.no_grad()
    def set_transform(
        self, transform: TransformSpec | None, tensors: Mapping[str, Tensor] = {}, name: str = "weight"
    ) -> None:
        """Transform input and output from now on; None: no more. For a layer that is not packed yet.

        Codes that were chosen without the transform would be wrong.

        Raises:
            ValueError: tensors of other shapes than the transform's, or a kind of layer that has no transforms.
        """
        self._set_parts(f"{name}_transform_", replace(self.layer_spec, transform=transform), transform, tensors, name)

    def exact_tensors(self, name: str = "weight") -> dict[str, Tensor]:
        """Part -> tensor of the exact part, as stored; empty without one."""
        return self._parts(f"{name}_exact_")

    @torch.no_grad()
    def set_exact(self, exact: ExactSpec | None, tensors: Mapping[str, Tensor] = {}, name: str = "weight") -> None:
        """Keep some weights exact from now on; None: no more. Before the codes are packed, or together with them.

        Raises:
            ValueError: tensors of other shapes than the exact part's, or a kind of layer that has none.
        """
        self._set_parts(f"{name}_exact_", replace(self.layer_spec, exact=exact), exact, tensors, name)

    def with_exact(self, name: str, decoded: Tensor) -> Tensor:
        """Decoded codes ``[rows, columns]`` with the exact part: what is multiplied, but for branch and transform."""
        exact = self.layer_spec.exact
        return decoded if exact is None else exact.merged(decoded, self.exact_tensors(name))

    def without_exact(self, name: str, matrix: Tensor) -> Tensor:
        """A weight ``[rows, columns]`` as codes are chosen for it: zero where weights are kept exact."""
        exact = self.layer_spec.exact
        return matrix if exact is None else exact.coded(matrix, self.exact_tensors(name))

    def fit_exact(self, name: str, matrix: Tensor, decoded: Tensor) -> None:
        """Keep the weights of ``matrix`` in the places that are kept, beside codes that decode to ``decoded``."""
        exact = self.layer_spec.exact
        if exact is not None:
            self.set_exact(exact, exact.fitted(matrix, decoded, self.exact_tensors(name)), name)

    def _parts(self, prefix: str) -> dict[str, Tensor]:
        return {
            key[len(prefix) :]: tensor
            for key, tensor in self._parameters.items()
            if tensor is not None and key.startswith(prefix)
        }

    def _set_parts(self, prefix: str, spec: LayerSpec, what: object, tensors: Mapping[str, Tensor], name: str) -> None:
        for part in self._parts(prefix):
            delattr(self, f"{prefix}{part}")
        self.layer_spec = spec
        expected = {key: value for key, value in self.companion_shapes(name).items() if key.startswith(prefix)}
        given = {f"{prefix}{part}": (tuple(tensor.shape), tensor.dtype) for part, tensor in tensors.items()}
        if given != expected:
            raise ValueError(f"{what} has the tensors {expected}, not {given}")
        for part, tensor in tensors.items():  # copies: layers of one input share values, never storage
            setattr(self, f"{prefix}{part}", frozen(tensor.clone()))

    def dequantized(self, name: str = "weight", dtype: torch.dtype = torch.float32, branch: bool = True) -> Tensor:
        """The weight the layer applies, in its original layout; without ``branch`` the codes and the exact part alone.

        A transform is folded in, exactly, because it is linear: this is the weight for the input as it comes.
        """
        is_plain = self.layer_spec.transform is None and self.layer_spec.exact is None
        wide = dtype if is_plain else torch.float32
        matrix = self.with_exact(name, decode_matrix(self.packed(name), wide, self.backend))
        factors = self.low_rank_factors(name, wide) if branch else None
        if factors is not None:
            matrix = matrix + expand_low_rank(*factors, self.branches(name))
        return self.from_matrix(name, matrix).to(dtype)

    def check(self) -> None:
        """Raise CorruptWeightError for stored tensors of a wrong shape or with non-finite scales or tables."""
        for name in self.packed_parameters:
            for key, (shape, dtype) in self.companion_shapes(name).items():
                tensor = getattr(self, key)
                if (tuple(tensor.shape), tensor.dtype) != (shape, dtype):
                    raise CorruptWeightError(
                        f"{key} is {tuple(tensor.shape)} {tensor.dtype}, but the plan says {shape} {dtype}"
                    )
                if key != name and tensor.device.type != "meta" and not _is_finite(key, tensor, self.layer_spec):
                    raise CorruptWeightError(f"{key} holds NaN or infinite values")
            self._check_parts(name)

    def _check_parts(self, name: str) -> None:
        spec = self.layer_spec
        if problem := self.input_problem(name):
            raise CorruptWeightError(problem)
        for what, part, tensors in (
            ("transform", spec.transform, self.transform_tensors(name)),
            ("exact", spec.exact, self.exact_tensors(name)),
        ):
            if part is None or any(tensor.device.type == "meta" for tensor in tensors.values()):
                continue
            (rows,), columns = self.matrix_shape(name)
            if problem := part.problem(tensors, rows, columns):
                raise CorruptWeightError(f"{name}_{what}: {problem}")

    def extra_repr(self) -> str:
        shapes = ", ".join("x".join(map(str, (*s[0], s[1]))) for s in map(self.matrix_shape, self.packed_parameters))
        weight, rank = self.layer_spec.weight, self.layer_spec.low_rank
        group = "row" if weight.group_size is None else weight.group_size
        activation = "" if self.layer_spec.activation is None else f", activation={self.layer_spec.activation}"
        transform = "" if self.layer_spec.transform is None else f", transform={self.layer_spec.transform.kind}"
        exact = (
            ""
            if self.layer_spec.exact is None
            else f", exact={self.layer_spec.exact.count} {self.layer_spec.exact.kind}"
        )
        bits = "" if self.layer_spec.factor_bits == 16 else f" of {self.layer_spec.factor_bits} bits"
        low_rank = f", rank={rank}{bits}" if rank else ""
        return f"{shapes}, {weight.format} {weight.bits} bits, group={group}{activation}{transform}{exact}{low_rank}"


def expect(module: nn.Module, cls: type[_Module]) -> _Module:
    """The module, if it is of the class that a kind packs. Raises TypeError otherwise."""
    if not isinstance(module, cls):
        raise TypeError(f"a {type(module).__name__} is not a {cls.__name__}")
    return module


def frozen(tensor: Tensor) -> nn.Parameter:
    """A parameter without gradient."""
    return nn.Parameter(tensor, requires_grad=False)


def _is_finite(key: str, tensor: Tensor, spec: LayerSpec) -> bool:
    judged = "_transform_" in key or "_exact_" in key or key.startswith("site_")
    if judged or key.endswith((INPUT_SCALE, INPUT_SHIFT, "_ends")):
        return True  # where they are understood
    if "_low_rank_" in key:
        return tensor.dtype == torch.int32 or bool(torch.isfinite(from_bits(tensor, FACTOR_DTYPE)).all())
    if key.endswith("_zero_point") and spec.weight.has_integer_zero_point:
        return True
    if key.endswith(("_scale", "_zero_point")) and spec.weight.scale_bits is not None:
        return True  # codes: their ranges are what can be wrong
    if key.endswith(("_table", "_constant_input", "_constant_output")):
        return bool(torch.isfinite(tensor.view(torch.float32)).all())
    return bool(torch.isfinite(from_bits(tensor, spec.weight.scale_dtype)).all())
