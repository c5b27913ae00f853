"""The scales of what packed mixers compute between their projections (Quamba, arXiv 2410.13229; Quamba2, 2503.22879).

Observers see what a mixer whose weights are packed computes in floats [ours; the papers' see the float model].
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from hf_lowbit.calibration.block import Block
from hf_lowbit.calibration.parallel import combine
from hf_lowbit.calibration.percentile import Observer, OverallPercentile, RunningPercentile
from hf_lowbit.calibration.static_inputs import with_dynamic_inputs
from hf_lowbit.formats import ActivationSpec
from hf_lowbit.nn import PackedMixer, PackedModule
from hf_lowbit.nn.inputs import is_scale
from hf_lowbit.plan import packed_modules

UNKNOWN_SITES = "not finite, or zero, or missing on the calibration data, so that the mixer computes in floats"
_SITE = ActivationSpec(static=True)  # how sites are quantized
_LEAST = 1e-8  # of a limit: what is always zero still has a scale
_READERS = {"x_proj": ("x",), "dt_proj": ("dt_in", "x_proj")}  # layer -> the site that it reads, by generation


@torch.no_grad()
def set_mixer_scales(
    block: Block, percentile: float = 100.0, sigma: float | None = None, state_percentile: float | None = None
) -> None:
    """Give the packed mixers of a block the scales of their sites, and the layers that read a site the same ones.

    A scale covers the largest |x| of its tensor, state group, or cluster of channels. A mixer with a site of no usable
    range computes in floats instead, and a note says so.

    Args:
        percentile: of |x| that the scale of the scan's input covers, where one serves the whole tensor; 100: the
            largest of all data.
        sigma: of :class:`hf_lowbit.calibration.percentile.RunningPercentile`; None: over all data.
        state_percentile: that of the state, likewise; None: the same.
    """
    clips = {"x": percentile, "state": percentile if state_percentile is None else state_percentile}
    packed = packed_modules(block.module)
    mixers = {name: module for name, module in packed.items() if isinstance(module, PackedMixer) and module.sites()}
    observers = {
        name: {site: _observer(mixer, site, clips.get(site, 100.0), sigma) for site in mixer.sites()}
        for name, mixer in mixers.items()
    }
    with _observed(mixers, observers):
        for batch in range(len(block)) if mixers else ():
            block.run(batch)
    combine(observer for own in observers.values() for observer in own.values())
    for name, mixer in mixers.items():
        found = {site: _scale(observer) for site, observer in observers[name].items()}
        scales = {site: scale for site, scale in found.items() if scale is not None}
        if unknown := [site for site in found if site not in scales]:
            mixer.layer_spec = with_dynamic_inputs(mixer.layer_spec)
            block.note(f"{name}.A_log" if name else "A_log", f"{', '.join(unknown)}: {UNKNOWN_SITES}")
            continue
        for site, scale in scales.items():
            mixer.set_site_scale(site, scale)
        _set_readers(mixer, scales)


class ScalePeaks:
    """The largest |x| that each scale of a site covers, a statistic of what the mixer tells of it.

    Args:
        shape: of the site's scale: ``[1]``, ``[G]``, ``[channels]``, or with clusters ``[G, m, c]``, ``[G, m, c, n]``.
        clusters: of a site with such, int64 ``[channels]``: the number of each channel's, counted over ``[G, m, c]``.
    """

    def __init__(self, shape: tuple[int, ...], device: torch.device, clusters: Tensor | None = None) -> None:
        self.tokens = 0
        self.limit = torch.zeros(shape, device=device)
        self._clusters = clusters

    def update(self, x: Tensor) -> None:
        """Take in ``[batch, tokens, channels]``, or ``[batch, tokens, G or channels, n]``."""
        self.tokens += x.shape[0] * x.shape[1]
        if x.numel():
            peaks = x.detach().float().abs().amax((0, 1))
            self.limit = torch.maximum(self.limit, self._of_scales(peaks))

    def summed(self) -> list[Tensor]:
        return []

    def largest(self) -> list[Tensor]:
        return [self.limit]

    def _of_scales(self, peaks: Tensor) -> Tensor:
        if self._clusters is not None:
            return peaks_of_clusters(peaks, self._clusters, self.limit.shape)
        if self.limit.shape == (1,):
            return peaks.amax().reshape(1)
        return peaks.amax(-1)


def peaks_of_clusters(peaks: Tensor, clusters: Tensor, shape: Sequence[int]) -> Tensor:
    """The largest of ``[channels]`` or ``[channels, n]`` over each cluster, ``[G, m, c]`` or ``[G, m, c, n]``.

    Args:
        clusters: as of :class:`ScalePeaks`.
        shape: of the result.
    """
    rows = peaks.reshape(len(clusters), -1)
    largest = rows.new_zeros(math.prod(shape) // rows.shape[1], rows.shape[1])
    index = clusters.to(rows.device).unsqueeze(1).expand_as(rows)
    return largest.scatter_reduce(0, index, rows, "amax").reshape(tuple(shape))


def _observer(mixer: PackedMixer, site: str, percentile: float, sigma: float | None) -> Observer:
    shape, device = mixer.sites()[site], mixer.get_parameter("A_log").device
    if len(shape) > 1:
        if (clusters := mixer.clusters_of_channels()) is None:
            raise ValueError(f"the clusters of {site!r} are not known yet: set_clusters comes first")
        return ScalePeaks(shape, device, clusters)
    if percentile == 100 or shape != (1,):
        return ScalePeaks(shape, device)
    return OverallPercentile(percentile, device) if sigma is None else RunningPercentile(percentile, sigma)


def _scale(observer: Observer) -> Tensor | None:
    """What a site is divided by, float32; None where its range is not known."""
    limit = observer.limit if observer.tokens else torch.zeros(1)
    scale = limit.clamp(min=_LEAST) / _SITE.limit
    return scale if bool(limit.any()) and is_scale(scale) else None


@contextmanager
def _observed(mixers: Mapping[str, PackedMixer], observers: Mapping[str, Mapping[str, Observer]]) -> Iterator[None]:
    """Within it mixers tell their observers what they compute."""
    try:
        for name, mixer in mixers.items():
            mixer.listener = lambda site, x, own=observers[name]: own[site].update(x)
        yield
    finally:
        for mixer in mixers.values():
            mixer.listener = None


def _set_readers(mixer: PackedMixer, scales: Mapping[str, Tensor]) -> None:
    """Layers that read a site quantize to its codes once more: what they read is on that grid already.

    Those with inputs of another format are left to :func:`hf_lowbit.calibration.static_inputs.set_static_inputs`.
    """
    for name, sites in _READERS.items():
        layer = getattr(mixer, name, None)
        site = next((site for site in sites if site in scales), None)
        if site is not None and isinstance(layer, PackedModule) and layer.layer_spec.activation == _SITE:
            layer.set_input_scale("weight", scales[site])
