"""Rotating the heads of attention's values, and what layers read that no rotation of the stream reaches.

QuaRot (arXiv 2404.00456), stages 1b to 1d. Where values flow to the layer after attention is found as sites for scales
are (:mod:`hf_lowbit.calibration.sites`); how large a head is, by trying which rotations the block does not notice
[ours].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hf_lowbit.calibration.block import Block
from hf_lowbit.calibration.scaling import block_sites, first_sequence
from hf_lowbit.calibration.sites import Site
from hf_lowbit.calibration.trial import Trial
from hf_lowbit.nn import Hadamard
from hf_lowbit.transforms.fold import input_weights, output_weights
from hf_lowbit.transforms.hadamard import hadamard, hadamard_base, largest_hadamard

Update = tuple[nn.Parameter, Tensor]
_MULTIPLES = (9, 7, 5, 3)  # of a power of two, that heads have
_SLACK = 30.0  # between rounding errors of one kind


@torch.no_grad()
def rotate_heads(block: Block) -> dict[str, int]:
    """Rotate every value projection's outputs by a Hadamard matrix per head, and back in the layers that read them.

    The function stays the same, up to rounding. For a block whose layers are all float.

    Returns:
        Reader of values (``o_proj``) -> channels that were rotated together: a head, or equal parts of one.
    """
    sites = [site for site in block_sites(block, ("linear",)) if site.previous is not None]
    if not sites:
        return {}
    trial = Trial(block.module, *first_sequence(block))
    rotated: dict[str, int] = {}
    for site in sites:
        size = _head_size(trial, site)
        if size > 1:
            _store(_updates(block.module, site, size))
            rotated |= dict.fromkeys(site.consumers, size)
    return rotated


def online_hadamard(width: int, head: int | None = None) -> Hadamard | None:
    """The transform of a layer's input of ``width`` channels; None if only 1 divides them.

    Where heads of ``head`` channels are rotated already, heads are mixed, which together mixes all channels; otherwise
    all channels are mixed at once, or in the largest blocks that a matrix is known for.
    """
    if head is not None and width > head and hadamard_base(width // head) is not None:
        return Hadamard(width // head, head)
    order = largest_hadamard(width)
    return Hadamard(order) if order > 1 else None


def _head_size(trial: Trial, site: Site) -> int:
    """The largest number of neighbouring channels whose rotation the trial's block does not notice; 1 if none.

    Between a gate and the layer after it even two are too many. Heads that attend alike are told apart by what mixing
    them adds to the rounding error.
    """
    limit = site.channels if site.head_dim is None else site.head_dim
    if limit % 2 or (least := _error(trial, site, 2)) is None:
        return 1

    def unnoticed(size: int) -> bool:
        if limit % size or hadamard_base(size) is None:
            return False
        error = _error(trial, site, size)
        return error is not None and error <= _SLACK * max(least, trial.precision)

    size = 2
    while unnoticed(2 * size):
        size *= 2
    return next((multiple * size for multiple in _MULTIPLES if unnoticed(multiple * size)), size)


def _error(trial: Trial, site: Site, size: int) -> float | None:
    """What rotating a trial's heads changes, relative to its outputs; None if that is more than rounding."""
    block = trial.modules[""]
    with _tried(_updates(block, site, size)):
        outputs = trial.run()
    with _tried(_rotated_outputs(block, site, size)):
        unbalanced = trial.run()
    if not trial.preserves(outputs, unbalanced):
        return None
    pairs = zip(outputs, trial.outputs, strict=True)
    return max(float((new - own).norm() / own.norm().clamp(min=1e-30)) for new, own in pairs)


def _updates(block: nn.Module, site: Site, size: int) -> list[Update]:
    read = [entry for name in site.consumers for entry in input_weights(block.get_submodule(name))]
    return _rotated_outputs(block, site, size) + [(p, _rotated(p, dim, size)) for p, dim in read]


def _rotated_outputs(block: nn.Module, site: Site, size: int) -> list[Update]:
    assert site.previous is not None
    return [(p, _rotated(p, dim, size)) for p, dim in output_weights(block.get_submodule(site.previous))]


def _rotated(parameter: nn.Parameter, dim: int, size: int) -> Tensor:
    rows = parameter.detach().movedim(dim, -1).double()
    return hadamard(rows, size).movedim(-1, dim).to(parameter.dtype).contiguous()


@contextmanager
def _tried(updates: Sequence[Update]) -> Iterator[None]:
    kept = [(parameter, parameter.data) for parameter, _ in updates]
    try:
        _store(updates)
        yield
    finally:
        _store(kept)


def _store(updates: Sequence[Update]) -> None:
    for parameter, value in updates:
        parameter.data = value
