"""Attention of one token in a compiled graph on a CPU becomes plain sums, which inductor fuses.

torch's flash attention there (``aten._scaled_dot_product_flash_attention_for_cpu``) packs the keys of 16-bit inputs for
matrix products before it multiplies them; for a single query that takes longer than the sums. And the keys and values
that several heads share (grouped-query attention) are copied for each head before it; the sums read them where they
are.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node

aten = torch.ops.aten
ATTENTION = aten._scaled_dot_product_flash_attention_for_cpu.default

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_RESHAPES = (aten.reshape.default, aten.view.default, aten._unsafe_view.default)
_REPEATS = (_RESHAPES, (aten.clone.default,), (aten.expand.default,))  # of keys and values, from the last one back


@dataclass(frozen=True)
class SumOneQuery(CustomGraphPass):
    """For inductor's option ``post_grad_custom_pre_pass``. All are equal, so that equal options stay equal."""

    def __call__(self, graph: Graph) -> None:
        """Rewrite the graph in place."""
        for node in list(graph.find_nodes(op="call_function", target=ATTENTION)):
            if _is_of_one_query(node):
                _replace(graph, node)

    def uuid(self) -> Any:
        """What inductor's cache knows this pass by."""
        return get_hash_for_files((__file__,))


def _is_of_one_query(node: Node) -> bool:
    """Of known sizes but for the number of keys, without dropout and causality, and only its result is used, not the
    logarithms of its sums."""
    query, key, value, dropout, causal, _, _ = _arguments(node)
    sizes = [size for tensor in (query, key, value) for at, size in enumerate(_value(tensor).shape) if at != 2]
    return (
        all(isinstance(size, int) for size in (*sizes, _value(query).shape[2]))
        and _value(query).shape[2] == 1
        and _value(query).dtype in _DTYPES
        and not (dropout or causal)
        and all(user.target is operator.getitem and (user.args[1] == 0 or not user.users) for user in node.users)
    )


def _arguments(node: Node) -> tuple[Any, ...]:
    """query, key, value, dropout_p, is_causal, attn_mask, scale."""
    names = ("query", "key", "value", "dropout_p", "is_causal", "attn_mask", "scale")
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    return tuple(given.get(name) for name in names)


def _value(node: Node) -> torch.Tensor:
    value: torch.Tensor = node.meta["val"]
    return value


def _replace(graph: Graph, node: Node) -> None:
    """Sums in float32, whatever the inputs are: also what torch computes in, but for rounding the weights."""
    query, key, value, _, _, mask, scale = _arguments(node)
    batch, heads, _, width = _value(query).shape
    call = _caller(graph, node)

    def convert(tensor: Node, dtype: torch.dtype = torch.float32) -> Node:
        return call(torch.ops.prims.convert_element_type.default, tensor, dtype)

    def of_groups(tensor: Node, shared: Node, *sizes: int) -> Node:
        groups = _value(shared).shape[1]
        return call(aten.reshape.default, tensor, [batch, groups, heads // groups, *sizes])

    key, value = _before_repeats(call, key, heads), _before_repeats(call, value, heads)
    scaled = call(aten.mul.Tensor, convert(query), width**-0.5 if scale is None else scale)
    products = call(aten.mul.Tensor, of_groups(scaled, key, 1, width), convert(key))
    scores = call(aten.reshape.default, call(aten.sum.dim_IntList, products, [-1]), [batch, heads, 1, -1])
    if mask is not None:  # numbers: torch has turned one of booleans into them
        scores = call(aten.add.Tensor, scores, convert(mask))
    # The clamps are for a query that sees no key: its result is zeros, as torch has it, where it would be NaN.
    largest = call(aten.clamp_min.default, call(aten.amax.default, scores, [-1], True), torch.finfo(torch.float32).min)
    weights = call(aten.exp.default, call(aten.sub.Tensor, scores, largest))
    total = call(aten.clamp_min.default, call(aten.sum.dim_IntList, weights, [-1], True), 1.0)
    weights = of_groups(call(aten.div.Tensor, weights, total), value, -1, 1)
    sums = call(aten.sum.dim_IntList, call(aten.mul.Tensor, weights, convert(value)), [-2])
    result = convert(call(aten.reshape.default, sums, [batch, heads, 1, _value(value).shape[-1]]), _value(query).dtype)
    for user in list(node.users):
        user.replace_all_uses_with(result)  # of what is used, the result only
        graph.erase_node(user)
    graph.erase_node(node)


def _caller(graph: Graph, place: Node) -> Callable[..., Node]:
    """What inserts calls before the place, with the metadata that inductor reads."""

    def call(target: Any, *args: Any) -> Node:
        with graph.inserting_before(place):
            node = graph.call_function(target, args)
        node.meta["val"] = target(*(_value(arg) if isinstance(arg, Node) else arg for arg in args))
        return node

    return call


def _before_repeats(call: Callable[..., Node], tensor: Node, heads: int) -> Node:
    """(batch, groups, 1, keys, width) of keys or values: as they were before they were repeated for every head."""
    batch, _, *sizes = _value(tensor).shape
    shared, steps = tensor, []
    for targets in _REPEATS:
        if shared.target not in targets:
            break
        steps.append(shared)
        shared = cast("Node", shared.args[0])
    else:
        before, after = _value(shared).shape, _value(steps[-1]).shape
        groups = before[1]
        if before == (batch, groups, 1, *sizes) and after == (batch, groups, heads // groups, *sizes):
            return shared
    return call(aten.unsqueeze.default, tensor, 2)
