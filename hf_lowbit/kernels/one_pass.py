"""Several passes over a compiled graph as one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph


@dataclass(frozen=True)
class OnePass(CustomGraphPass):
    """Passes that run one after the other; not every torch takes a list of them."""

    passes: tuple[CustomGraphPass, ...]

    def __call__(self, graph: Graph) -> None:
        """Rewrite the graph in place."""
        for one in self.passes:
            one(graph)

    def uuid(self) -> Any:
        """Those of the passes; None, which keeps the graph out of inductor's cache, if one has none."""
        uuids = tuple(one.uuid() for one in self.passes)
        return None if None in uuids else uuids
