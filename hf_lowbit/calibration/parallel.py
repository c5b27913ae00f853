"""Several processes, each with a part of the data: sums over all of them, and one result for all of them.

With gloo tensors travel from where they are. With NCCL every process has a GPU of its own, which torch.cuda.set_device
has made its current one: what lies elsewhere travels over it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from hf_lowbit.calibration.statistics import Statistic

_T = TypeVar("_T")


def processes() -> int:
    """How many there are; 1 outside torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process' number."""
    return dist.get_rank() if processes() > 1 else 0


def share(items: Sequence[_T]) -> list[_T]:
    """This process' part of the batches. Raises ValueError when there are fewer batches than processes."""
    if len(items) < processes():
        raise ValueError(f"{len(items)} batches cannot be shared by {processes()} processes: give more samples")
    return list(items[rank() :: processes()])


def combine(statistics: Iterable[Statistic]) -> None:
    """Make every process' statistics those of all the data."""
    if processes() == 1:
        return
    for statistic in statistics:
        count = torch.tensor(statistic.tokens, dtype=torch.int64)
        _all_reduce(count, dist.ReduceOp.SUM)
        statistic.tokens = int(count)
        for tensor in statistic.summed():
            _all_reduce(tensor, dist.ReduceOp.SUM)
        for tensor in statistic.largest():
            _all_reduce(tensor, dist.ReduceOp.MAX)


def in_order(values: Sequence[_T]) -> list[_T]:
    """What all processes found, one value for each of their batches, in the order of the data: :func:`share` undone."""
    if processes() == 1:
        return list(values)
    found: list[list[_T]] = [[] for _ in range(processes())]
    dist.all_gather_object(found, list(values))
    rounds = range(max(map(len, found)))
    return [own[index] for index in rounds for own in found if index < len(own)]


def union(values: Iterable[float]) -> set[float]:
    """The values that any process has."""
    own = set(values)
    if processes() == 1:
        return own
    found: list[set[float]] = [set() for _ in range(processes())]
    dist.all_gather_object(found, own)
    return set().union(*found)


def agree(tensor: Tensor) -> None:
    """Make a tensor the first process' in all of them, in place."""
    if processes() == 1 or not tensor.numel():
        return
    flat = _travelling(tensor.detach()).contiguous().reshape(-1)
    sent = flat.view(torch.uint8)  # gloo knows no int16
    dist.broadcast(sent, 0)
    tensor.copy_(flat.reshape(tensor.shape))


def wait_for_all() -> None:
    """Every process reaches this point before any goes on."""
    if processes() > 1:
        dist.barrier()


def _all_reduce(tensor: Tensor, how: dist.ReduceOp.RedOpType) -> None:
    """In place, wherever it lies."""
    sent = _travelling(tensor).contiguous()
    dist.all_reduce(sent, how)
    if sent is not tensor:
        tensor.copy_(sent)


def _travelling(tensor: Tensor) -> Tensor:
    """The tensor where the backend can send it: NCCL knows no memory but its GPU's."""
    return tensor.cuda() if dist.get_backend() == "nccl" else tensor
