"""Sines and cosines of positions in a compiled graph on a CPU are computed once.

inductor takes them for cheap and repeats them wherever they are read: in every layer of a model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph

aten = torch.ops.aten
_FUNCTIONS = (aten.sin.default, aten.cos.default)


@dataclass(frozen=True)
class ComputeAnglesOnce(CustomGraphPass):
    """For inductor's option ``post_grad_custom_pre_pass``. All are equal, so that equal options stay equal."""

    def __call__(self, graph: Graph) -> None:
        """Let what reads them read a view, for which inductor stores them."""
        for function in _FUNCTIONS:
            for node in graph.find_nodes(op="call_function", target=function):
                angles: torch.Tensor = node.meta["val"]
                sizes = [*angles.shape, *angles.stride()]
                if angles.device.type != "cpu" or not all(isinstance(size, int) for size in sizes):
                    continue
                with graph.inserting_after(node):
                    view = graph.call_function(aten.as_strided.default, (node, [*angles.shape], [*angles.stride()]))
                view.meta["val"] = angles.as_strided(angles.shape, angles.stride())
                node.replace_all_uses_with(view, delete_user_cb=lambda user, view=view: user is not view)

    def uuid(self) -> Any:
        """What inductor's cache knows this pass by."""
        return get_hash_for_files((__file__,))
