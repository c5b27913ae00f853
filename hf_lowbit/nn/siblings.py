"""Linear layers that read the same input compute together: query, key and value; gate and up.

The modules and their parameters stay what they are. The first sibling that is called on an input computes all of them
in one call of the kernel and keeps the others' results for the moment. Nothing is wrong when that does not hold: a
sibling called with another input, or changed input, computes its own result, and siblings that turn out not to share
their input (cross-attention) stop trying. Layers with a transform, an exact part or a constant token compute alone.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_lowbit.kernels import MOST_TOKENS, is_eager, packed_linears
from hf_lowbit.nn.last_product import LastProduct, last_product

if TYPE_CHECKING:
    from hf_lowbit.nn.linear import PackedLinear

# Names under which architectures keep projections of one input.
SIBLING_NAMES = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("to_q", "to_k", "to_v"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
)


class Siblings:
    """Some linear layers of one parent, in the order of their names. Copies and pickles of it are None."""

    def __init__(self, parent: nn.Module, names: list[str]) -> None:
        self._parent, self._names = weakref.ref(parent), names
        self._input: Tensor | None = None
        self._version = 0
        self._results: dict[int, Tensor] = {}  # by the identity of the member it is for
        self._last: LastProduct | None = None
        self.active = True

    def take(self, member: PackedLinear, x: Tensor) -> Tensor | None:
        """The member's product with x, if siblings compute it; None if the member has to."""
        if not self.active or torch.compiler.is_compiling() or (x.requires_grad and torch.is_grad_enabled()):
            return None
        is_new = self._input is not x or self._version != x._version
        if is_new and not self._compute(x):
            return None
        result = self._results.pop(id(member), None)
        if not self._results:
            self._input = None
        return result

    def _compute(self, x: Tensor) -> bool:
        """All products with x; False if they must not be computed together."""
        if self._results:  # somebody did not come for the last ones
            self.active, self._results, self._input = False, {}, None
            return False
        parent = self._parent()
        members: list[Any] = [] if parent is None else [parent._modules.get(name) for name in self._names]
        for member in members:
            if not _is_untouched(member):
                return False
        results = None if self._last is None or x.is_inference() else self._last.of(members, x)
        if results is None:
            if not members or not _is_suitable(x):
                return False
            results = self._products(members, x)
        self._input, self._version = x, x._version
        self._results = {id(member): result for member, result in zip(members, results, strict=True)}
        return True

    def _products(self, members: list[Any], x: Tensor) -> list[Tensor]:
        first = members[0]
        scale, shift = first.input_scales("weight", x.shape[:-1])
        weights, sums = [member.packed() for member in members], [member.row_sums() for member in members]
        results = packed_linears(x, weights, first.layer_spec.activation, first.backend, scale, shift, sums)
        self._last = last_product(members, x) or self._last
        return results

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


def connect_siblings(model: nn.Module) -> int:
    """Let packed linear layers that share an input compute together; returns the number of groups."""
    groups = 0
    for parent in model.modules():
        for names in SIBLING_NAMES:
            present = [name for name in names if _is_linear(getattr(parent, name, None))]
            first = getattr(parent, present[0]) if present else None
            alike = [name for name in present if _reads_alike(getattr(parent, name), first)]
            if len(alike) > 1:
                group = Siblings(parent, alike)
                for name in alike:
                    getattr(parent, name).siblings = group
                groups += 1
    return groups


def disconnect_siblings(model: nn.Module) -> None:
    """Every layer computes its own product again."""
    for module in model.modules():
        if _is_linear(module):
            module.siblings = None  # type: ignore[assignment]


def _is_linear(module: Any) -> bool:
    return getattr(module, "kind", None) == "linear" and hasattr(module, "siblings")


def _reads_alike(module: Any, first: Any) -> bool:
    same = module.in_features == first.in_features and module.layer_spec.activation == first.layer_spec.activation
    spec = module.layer_spec
    plain = spec.transform is None and spec.exact is None and not spec.constant_token
    return bool(same and plain and module.is_packed() and _has_scale_of(module, first))


def _has_scale_of(module: Any, first: Any) -> bool:
    """Whether their codes are the same: layers of one input share the value of a stored scale."""
    if module is first or not first.has_static_inputs:
        return True
    if module.input_scale() is None or module.input_scale().device.type == "meta":
        return False
    return all(_is_same(*pair) for pair in zip(module.input_table(), first.input_table(), strict=True))


def _is_same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one, other)


def _is_suitable(x: Tensor) -> bool:
    """Beyond some tokens a call's fixed cost no longer counts, and the waiting results take memory."""
    return x.numel() <= MOST_TOKENS * x.shape[-1] and not x.is_inference() and is_eager(x)


def _is_untouched(module: Any) -> bool:
    """False for what an adapter has wrapped, a hook listens to, or offloading has taken the forward of."""
    if getattr(type(module), "kind", None) != "linear":
        return False
    own = module.__dict__  # of modules it is looked up faster than attributes are
    return not (own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or "forward" in own)
