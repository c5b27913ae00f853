"""Products of one input in a compiled graph become one call: query, key and value; gate and up.

Eager layers do so by :mod:`hf_lowbit.nn.siblings`, at run time; in a graph it is seen which products read the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node

from hf_lowbit.kernels.kept import KEPT_PRODUCTS
from hf_lowbit.kernels.ops import PRODUCTS


@dataclass(frozen=True)
class JoinProducts(CustomGraphPass):
    """For inductor's option ``post_grad_custom_pre_pass``. All are equal, so that equal options stay equal."""

    def __call__(self, graph: Graph) -> None:
        """Rewrite the graph in place."""
        readers: dict[Any, list[Node]] = {}
        for node in graph.nodes:
            if node.op == "call_function" and node.target in (PRODUCTS, KEPT_PRODUCTS):
                readers.setdefault((node.args[0], node.args[-1], node.target), []).append(node)
        place = {node: index for index, node in enumerate(graph.nodes)}
        for calls in readers.values():
            together = [call for call in calls if _has_known_size(call) and _can_be_at(call, calls[0], place)]
            if len(together) > 1:
                _join(graph, together)

    def uuid(self) -> Any:
        """What inductor's cache knows this pass by."""
        return get_hash_for_files((__file__,))


def _has_known_size(call: Node) -> bool:
    """Not of a number of tokens that differs from call to call."""
    return isinstance(call.meta["val"].numel(), int)


def _can_be_at(call: Node, first: Node, place: Mapping[Node, int]) -> bool:
    """Whether what the call reads is there at the first one, or can be put there: a constant."""
    stored: Any = [] if call.target is KEPT_PRODUCTS else call.args[1]
    return all(tensor.op == "get_attr" or place[tensor] < place[first] for tensor in stored)


def _join(graph: Graph, calls: list[Node]) -> None:
    """The calls have the same input, whose columns and activation they all state."""
    first, sizes = calls[0], [call.meta["val"].numel() for call in calls]
    arguments = _of_kept(calls) if first.target is KEPT_PRODUCTS else _of_stored(calls)
    with graph.inserting_before(first):
        joined = graph.call_function(first.target, arguments)  # type: ignore[arg-type]
    joined.meta = {**first.meta, "val": first.meta["val"].new_empty(sum(sizes))}
    inputs = [call.meta["eager_input_vals"] for call in calls if "eager_input_vals" in call.meta]
    if len(inputs) == len(calls):  # inductor keeps their strides
        joined.meta["eager_input_vals"] = _inputs([given for given, _ in inputs], arguments), {}
    offset = 0
    for call, size in zip(calls, sizes, strict=True):
        with graph.inserting_before(first):
            part = graph.call_function(torch.ops.aten.slice.Tensor, (joined, 0, offset, offset + size))
        part.meta = {key: value for key, value in call.meta.items() if key != "eager_input_vals"}
        offset += size
        call.replace_all_uses_with(part)
    for call in calls:
        graph.erase_node(call)


def _of_stored(calls: Sequence[Node]) -> tuple[Any, ...]:
    """Arguments of all of them; constants among their tensors are put before the first one."""
    first = calls[0]
    x, stored = _tensors(call.args for call in calls)
    for tensor in stored:
        if tensor.op == "get_attr":
            first.prepend(tensor)
    specs = f"[{', '.join(str(call.args[2])[1:-1] for call in calls)}]"
    return x, stored, specs, *first.args[3:]


def _of_kept(calls: Sequence[Node]) -> tuple[Any, ...]:
    arguments: list[Any] = [call.args for call in calls]
    x, _, _, activation = arguments[0]
    return (
        x,
        [number for _, numbers, *_ in arguments for number in numbers],
        sum(rows for *_, rows, _ in arguments),
        activation,
    )


def _inputs(given: Sequence[Sequence[Any]], arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """What eager calls were given, joined, for these arguments of their joined call."""
    x, stored = _tensors(given)
    return (x, *arguments[1:]) if isinstance(stored[0], int) else (x, stored, *arguments[2:])


def _tensors(calls: Iterable[Sequence[Any]]) -> tuple[Any, list[Any]]:
    """The input that the calls share, and what is stored of all matrices."""
    arguments = list(calls)
    return arguments[0][0], [tensor for _, stored, *_ in arguments for tensor in stored]
