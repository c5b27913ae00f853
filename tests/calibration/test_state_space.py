"""Scales of a mixer's sites: the largest value that each covers, or a percentile, and what has none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hf_lowbit.calibration.percentile import OverallPercentile, RunningPercentile
from hf_lowbit.calibration.state_space import ScalePeaks, peaks_of_clusters, set_mixer_scales
from hf_lowbit.formats import WeightSpec
from hf_lowbit.nn import KINDS, LayerSpec, MixerSpec, PackedMixer, mixer_kind
from hf_lowbit.plan import packed_modules, replace_modules
from tests.integrations.tiny_state_space import TINY, tokens

PLAIN = MixerSpec(8, 8)
CLUSTERED = MixerSpec(8, 8, group_scales=True, head_clusters=2, channel_clusters=3)
HEAD_ENDS, CHANNEL_ENDS = [[1, 2], [1, 2]], [[[4, 9, 16], [1, 2, 16]], [[5, 6, 16], [14, 15, 16]]]


class Whole:
    """A model in the place of a block, its mixers packed modules whose weights are still floats."""

    def __init__(self, model: Any, spec: MixerSpec, batches: int = 3) -> None:
        found = {name: module for name, module in model.named_modules() if mixer_kind(module) is not None}
        kinds = {name: KINDS[str(mixer_kind(module))] for name, module in found.items()}
        layer = LayerSpec(WeightSpec(bits=8, group_size="tensor"), mixer=spec)
        replace_modules(model, {name: kinds[name].from_float(module, layer) for name, module in found.items()})
        self.module, self.notes = model, dict[str, str]()
        self.batches = [tokens(2, 20, seed) for seed in range(batches)]

    def __len__(self) -> int:
        return len(self.batches)

    @torch.no_grad()
    def run(self, batch: int) -> None:
        self.module(self.batches[batch])

    def note(self, key: str, line: str) -> None:
        self.notes[key] = line

    @property
    def mixers(self) -> list[PackedMixer]:
        return [module for module in packed_modules(self.module).values() if isinstance(module, PackedMixer)]

    def values(self) -> list[dict[str, Tensor]]:
        """For each mixer what is told of its sites, batches joined."""
        told: list[dict[str, list[Tensor]]] = [{} for _ in self.mixers]
        for mixer, own in zip(self.mixers, told, strict=True):
            mixer.listener = lambda site, x, own=own: own.setdefault(site, []).append(x)  # type: ignore[misc]
        for batch in range(len(self)):
            self.run(batch)
        for mixer in self.mixers:
            mixer.listener = None
        return [{site: torch.cat(parts) for site, parts in own.items()} for own in told]


def scales_of(block: Any, **options: Any) -> list[dict[str, Tensor]]:
    """As they are found and stored."""
    set_mixer_scales(block, **options)
    assert all(mixer.listener is None for mixer in block.mixers)
    found = [{site: mixer.site_scale(site) for site in mixer.sites()} for mixer in block.mixers]
    return [{site: scale for site, scale in own.items() if scale is not None} for own in found]


@pytest.mark.parametrize("name", TINY)
def test_every_site_covers_its_largest_value(name: str) -> None:
    block = Whole(TINY[name].create(), PLAIN)
    values = block.values()
    for own, scales, mixer in zip(values, scales_of(block), block.mixers, strict=True):
        assert set(scales) == set(own) == set(mixer.sites())
        for site, scale in scales.items():
            assert torch.equal(scale, own[site].abs().amax().reshape(1) / 127), site
    assert not block.notes


def test_a_scale_for_each_channel_of_the_state() -> None:
    """Which no percentile clips."""
    block = Whole(TINY["mamba"].create(), MixerSpec(8, 8, channel_states=True))
    values = block.values()
    for own, scales in zip(values, scales_of(block, percentile=90.0), strict=True):
        assert torch.equal(scales["state"], own["state"].abs().amax((0, 1, 3)) / 127)


# Quamba2, test 3
def test_scales_of_groups_and_clusters() -> None:
    """Two state groups of two heads: a scale for each rectangle of heads and channels; of the state, for each n too."""
    block = Whole(TINY["mamba2"].create(), CLUSTERED)
    values = block.values()
    for mixer in block.mixers:
        mixer.set_clusters(torch.tensor(HEAD_ENDS), torch.tensor(CHANNEL_ENDS))
    for own, scales in zip(values, scales_of(block), strict=True):
        for site in ("B", "C"):
            assert torch.equal(scales[site], own[site].abs().amax((0, 1, 3)) / 127)
        x, state = own["x"].unflatten(2, (2, 2, 16)), own["state"].unflatten(2, (2, 2, 16))  # groups, heads, channels
        assert scales["x"].shape == (2, 2, 3) and scales["state"].shape == (2, 2, 3, 8)
        for group in range(2):
            for head in range(2):
                for index, end in enumerate(CHANNEL_ENDS[group][head]):
                    own_channels = slice(CHANNEL_ENDS[group][head][index - 1] if index else 0, end)
                    part = x[:, :, group, head, own_channels]
                    assert torch.equal(scales["x"][group, head, index], part.abs().amax() / 127)
                    peaks = state[:, :, group, head, own_channels].abs().amax((0, 1, 2))
                    assert torch.equal(scales["state"][group, head, index], peaks / 127)


# Quamba2, test 3
def test_one_cluster_is_a_scale_per_group() -> None:
    whole = MixerSpec(8, 8, head_clusters=1, channel_clusters=1)
    block = Whole(TINY["mamba2"].create(), whole)
    values = block.values()
    for mixer in block.mixers:
        mixer.set_clusters(torch.tensor([[2], [2]]), torch.tensor([[[16]], [[16]]]))
    for own, scales in zip(values, scales_of(block), strict=True):
        groups = own["x"].abs().unflatten(2, (2, 32)).amax((0, 1, 3))
        assert torch.equal(scales["x"].flatten(), groups / 127)
        assert scales["B"].shape == (1,)


# Quamba2, test 3
def test_the_error_falls_as_clusters_are_split() -> None:
    x = torch.randn(400, 64, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 65)

    def error(ends: list[int]) -> float:
        clusters = torch.searchsorted(torch.tensor(ends), torch.arange(64), right=True)
        peaks = ScalePeaks((1, 1, len(ends)), torch.device("cpu"), clusters)
        peaks.update(x[None])
        scale = (peaks.limit / 127).flatten()[clusters]
        return float(((x / scale).round() * scale - x).square().sum())

    errors = [error(ends) for ends in ([64], [32, 64], [16, 32, 64], [16, 32, 48, 64])]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.6 * errors[0]


def test_a_cluster_without_values_has_a_scale_all_the_same() -> None:
    found = peaks_of_clusters(torch.tensor([[1.0, 5.0], [3.0, 2.0], [0.0, 0.0]]), torch.tensor([0, 0, 2]), (1, 1, 3, 2))
    assert found.tolist() == [[[[3.0, 5.0], [0.0, 0.0], [0.0, 0.0]]]]
    model = TINY["mamba2"].create()
    for layer in model.backbone.layers:
        layer.mixer.conv1d.weight.data[:32] = 0  # of the first state group
        layer.mixer.conv1d.bias.data[:32] = 0
    block = Whole(model, CLUSTERED)
    for mixer in block.mixers:
        mixer.set_clusters(torch.tensor(HEAD_ENDS), torch.tensor(CHANNEL_ENDS))
    for scales in scales_of(block):
        assert bool((scales["x"][0] < 1e-9).all()) and bool((scales["x"][1] > 1e-4).all())


def test_clusters_come_before_their_scales() -> None:
    with pytest.raises(ValueError, match="the clusters of 'x' are not known yet"):
        set_mixer_scales(Whole(TINY["mamba2"].create(), CLUSTERED))  # type: ignore[arg-type]


@pytest.mark.parametrize("sigma", [None, 0.2])
def test_a_percentile_clips_what_the_scan_reads_and_its_state(sigma: float | None) -> None:
    block = Whole(TINY["mamba"].create(), PLAIN)
    values = block.values()
    for own, scales in zip(values, scales_of(block, percentile=90.0, sigma=sigma), strict=True):
        for site, x in own.items():
            if site not in ("x", "state"):
                assert torch.equal(scales[site], x.abs().amax().reshape(1) / 127), site
                continue
            observer = OverallPercentile(90.0) if sigma is None else RunningPercentile(90.0, sigma)
            for batch in x.split(2):
                observer.update(batch)
            assert torch.equal(scales[site], observer.limit / 127), site
            assert bool(scales[site] < 0.9 * x.abs().amax() / 127)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_a_mixer_without_a_usable_range_computes_in_floats(value: float) -> None:
    block = Whole(TINY["mamba"].create(), PLAIN)
    first, second = block.mixers
    second.x_proj.register_forward_hook(lambda module, args, output: output * value)  # type: ignore[union-attr]
    set_mixer_scales(block)  # type: ignore[arg-type]
    assert first.sites() and not second.sites()
    assert second.layer_spec.mixer == MixerSpec()
    ((key, note),) = block.notes.items()
    assert key == "backbone.layers.1.mixer.A_log"
    assert "x_proj" in note and "not finite, or zero, or missing on the calibration data" in note


def test_nothing_runs_where_nothing_is_quantized() -> None:
    block = Whole(TINY["mamba"].create(), MixerSpec())
    block.batches = [torch.zeros(0)]  # which no model takes
    set_mixer_scales(block)  # type: ignore[arg-type]
    assert not block.notes
