"""SVDQuant's smoothing: for layers of one input the scale with which branch and codes reproduce their outputs best.

Candidates are lam = max|X|^a / max|W|^b per channel with (a, b) = (0, 0), (a, 0) and (a, 1 - a) for a = n / steps; each
is tried with codes, branch and quantized inputs (arXiv 2411.05007, section 4.1, and the authors' code). The scale is
folded into what comes before where that is exact, and is a transform of the layers' input elsewhere.

[ours]: the error is that of the layers' own outputs, on a sample of tokens, where the authors compare outputs of the
module around them; trials take a randomized decomposition.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hf_lowbit.calibration.block import Block
from hf_lowbit.calibration.parallel import processes, rank
from hf_lowbit.calibration.scaling import block_sites, keys_of, storable_scale
from hf_lowbit.calibration.sites import Site, fold_site
from hf_lowbit.calibration.statistics import Magnitude, Statistic
from hf_lowbit.compensation.absorption import Part, absorb, sketched_factors
from hf_lowbit.nn import PackedLinear, Scaling
from hf_lowbit.transforms.fold import expand_scale, gather_repeats
from hf_lowbit.transforms.scales import smoothing_scale

_TOKENS = 512  # of each process' sample


class InputSample(Magnitude):
    """Some of the inputs themselves, evenly spread over all tokens, besides mean and largest |x| per channel."""

    def __init__(self, channels: int, device: torch.device | None = None) -> None:
        super().__init__(channels, device)
        self._sample = torch.zeros(0, channels, device=device)
        self._seen, self._stride = 0, 1

    def update(self, x: Tensor) -> None:
        super().update(x)
        self._sample = torch.cat([self._sample, x[-self._seen % self._stride :: self._stride]])
        self._seen += len(x)
        while len(self._sample) > _TOKENS:
            self._sample, self._stride = self._sample[::2].clone(), 2 * self._stride

    def summed(self) -> list[Tensor]:
        """The samples too: each process has its own rows among zeros, which no error comes from."""
        rows = self._sample.new_zeros(processes() * _TOKENS, self._sample.shape[1])
        rows[rank() * _TOKENS :][: len(self._sample)] = self._sample
        self._sample = rows
        return [*super().summed(), rows]

    @property
    def sample(self) -> Tensor:
        """float32 ``[tokens, channels]``."""
        return self._sample


class _Peaks(Statistic, Protocol):
    @property
    def maximum(self) -> Tensor:
        """Largest |x| per channel."""


@dataclass
class SharedInput:
    """Matrices that read one tensor.

    Attributes:
        keys: of the block's matrices.
        inputs: a sample of what they read, float32 ``[tokens, columns]``; None where no token reaches them, or none is
            kept.
        maximum: largest |x| per channel; None where no token reaches them.
        site: where a scale can be folded; None where it has to stay in the layers.
        is_linear: whether a scale can be kept in the layers.
    """

    keys: list[str]
    inputs: Tensor | None
    maximum: Tensor | None = None
    site: Site | None = None
    is_linear: bool = False


def parts_of(block: Block, keys: Sequence[str], scale: Tensor | None = None) -> list[Part]:
    """Matrices as they are to be decomposed, their columns multiplied by ``scale`` for a trial."""
    matrices = [block.matrices[key] for key in keys]
    return [
        Part(m.weight if scale is None else m.weight * scale, m.layer_spec, m.skeleton.branches(m.parameter))
        for m in matrices
    ]


@torch.no_grad()
def shared_inputs(block: Block, make: Callable[[int, torch.device], _Peaks] = InputSample) -> list[SharedInput]:
    """The block's matrices by what they read, in order of definition; those without inputs by themselves.

    Args:
        make: the statistic that is collected; only :class:`InputSample` keeps inputs themselves.
    """
    samples: Mapping[str, _Peaks] = block.collect(make)
    sites = block_sites(block)
    groups: dict[int | str, SharedInput] = {}
    for key, matrix in block.matrices.items():
        sample = samples.get(key)
        seen = sample is not None and sample.tokens > 0
        group = groups.setdefault(key if sample is None else id(sample), SharedInput([], None))
        group.keys.append(key)
        if sample is not None and seen:
            group.inputs = sample.sample if isinstance(sample, InputSample) else None
            group.maximum = sample.maximum
        group.is_linear = isinstance(matrix.skeleton, PackedLinear)
    for group in groups.values():
        group.site = next((site for site in sites if _serves(block, site, group)), None) if group.is_linear else None
    return list(groups.values())


@torch.no_grad()
def smooth_input(block: Block, group: SharedInput, steps: int, share: bool) -> None:
    """Find the best scale of a group and put it in place; the group's sample is divided by it too.

    Raises:
        FoldError: a scale that a parameter before the layers cannot hold.
    """
    if group.inputs is None or group.maximum is None:
        return
    best, least = None, float("inf")
    for scale in _candidates(block, group, steps):
        divided = group.inputs if scale is None else group.inputs / _expanded(group, scale)
        parts = parts_of(block, group.keys, None if scale is None else _expanded(group, scale))
        error = absorb(parts, divided, share=share, solve=sketched_factors).error
        if error < least:
            best, least = scale, error
    if best is not None:
        group.inputs = group.inputs / put_scale(block, group, best)


def _serves(block: Block, site: Site, group: SharedInput) -> bool:
    """Whether the site's scale is that of the group alone: no other matrix to be quantized reads it."""
    if site.previous is None:
        return False
    scaled = {key for layer in site.consumers for key in keys_of(block, layer)}
    return scaled == set(group.keys)


def _candidates(block: Block, group: SharedInput, steps: int) -> list[Tensor | None]:
    """Scales of the channels that are scaled; None, for none, first."""
    inputs, weights = ranges_of(block, group)
    scales: list[Tensor | None] = [None]
    for alpha in (n / steps for n in range(1, steps)):
        scales.append(smoothing_scale(inputs, torch.ones_like(inputs), alpha))
        scales.append(smoothing_scale(inputs, weights, alpha))
    return scales


def ranges_of(block: Block, group: SharedInput) -> tuple[Tensor, Tensor]:
    """Largest |x| and largest |w| of each channel that is scaled, over all matrices of the group."""
    assert group.maximum is not None
    columns = torch.stack([block.matrices[key].weight.float().abs().amax(0) for key in group.keys]).amax(0)
    return _gathered(group, group.maximum), _gathered(group, columns)


def _gathered(group: SharedInput, values: Tensor) -> Tensor:
    """Of heads that several others read the largest values over all of them."""
    site = group.site
    return values if site is None else gather_repeats(values, site.repeat, site.head_dim).amax(0)


def _expanded(group: SharedInput, scale: Tensor) -> Tensor:
    site = group.site
    return scale if site is None else expand_scale(scale, site.repeat, site.head_dim)


def put_scale(block: Block, group: SharedInput, scale: Tensor) -> Tensor:
    """Fold a scale of :func:`ranges_of`'s channels, or keep it in the layers.

    Returns:
        What the inputs are divided by in the end, ``[columns]``.

    Raises:
        FoldError: a scale that a parameter before the layers cannot hold.
    """
    if group.site is not None:
        exact = storable_scale(block.module, group.site, scale)
        fold_site(block.module, group.site, exact)
        return _expanded(group, exact).float()
    stored = scale.bfloat16().float()
    for key in group.keys:
        block.matrices[key].skeleton.set_transform(Scaling(), Scaling.stored(stored))
    return stored
