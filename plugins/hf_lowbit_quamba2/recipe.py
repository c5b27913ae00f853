"""The recipe of Quamba2: rotate the stream, sort and cluster, rotate the scan's output, then round with GPTQ."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from hf_lowbit.calibration.block import Block
from hf_lowbit.calibration.matrices import Matrix
from hf_lowbit.calibration.mixers import child_of, fold_gains, mixers_of, pack_mixers, rotate_outputs
from hf_lowbit.calibration.reordering import reorder_mixer
from hf_lowbit.calibration.rotating import rotate_stream
from hf_lowbit.calibration.second_order import as_read, round_second_order
from hf_lowbit.calibration.state_space import set_mixer_scales
from hf_lowbit.calibration.statistics import Hessian
from hf_lowbit.method import Recipe
from hf_lowbit.nn import PackedMixer
from hf_lowbit.rounding.clip import fit_clipped, fit_range
from hf_lowbit.rounding.gptq import GPTQResult, gptq
from hf_lowbit.rounding.store import round_with
from hf_lowbit.transforms.reorder import kmeans_partition, optimal_partition
from hf_lowbit_quamba2.config import CLUSTERS, Quamba2Config

_PARTITIONS = {"optimal": optimal_partition, "kmeans": kmeans_partition}
# Of Mamba, which has no clusters: where |x| and the state are clipped, and a sample's weight in the running mean.
_PERCENTILE, _STATE_PERCENTILE, _SIGMA = 99.999, 99.95, 0.01


def make_recipe(config: Quamba2Config) -> Recipe:
    """The output projection is rounded last, on what the quantized scan returns."""
    rotated: set[str] = set()
    grids = fit_clipped if config.search_clip else fit_range

    def prepare(model: nn.Module, batches: Sequence[dict[str, Any]]) -> list[str]:
        done = rotate_stream(model, batches, config.seed)
        rotated.update(done.readers)
        return done.notes

    def rounding(matrix: Matrix, statistic: Hessian) -> GPTQResult:
        hessian = as_read(matrix, statistic)
        return gptq(matrix.weight, matrix.spec, hessian, damping=config.damping, grid_fit=grids)

    def round_layers(block: Block, keys: Collection[str]) -> None:
        wanted = {key for key in keys if _takes_gptq(block.matrices[key], config)}
        for key in keys:
            if key not in wanted:
                weight, spec = block.matrices[key].weight, block.matrices[key].spec
                block.pack(key, round_with(grids if spec.bits < 8 else fit_range, weight, spec))
        if wanted:
            round_second_order(block, rounding, config.damping, wanted)

    @torch.no_grad()
    def calibrate(block: Block) -> None:
        mixers = mixers_of(block)
        if not any(block.full_name(child_of(name, "in_proj")) in rotated for name in mixers):
            fold_gains(block)
        for name, mixer in mixers.items():
            _reorder(block, name, mixer, config)
        rotate_outputs(block, floats=True)
        pack_mixers(block)
        last = {child_of(name, "out_proj") for name in mixers}
        round_layers(block, [key for key in block.unpacked if block.matrices[key].layer not in last])
        set_mixer_scales(block, _PERCENTILE, _SIGMA, _STATE_PERCENTILE)
        round_layers(block, block.unpacked)

    return Recipe(calibrate=calibrate, prepare=prepare if config.rotate else None)


def _reorder(block: Block, name: str, mixer: PackedMixer, config: Quamba2Config) -> None:
    """Sort and cluster a mixer of Mamba-2 whose scan reads codes."""
    spec = mixer.layer_spec.mixer
    if mixer.generation != 2 or spec is None or spec.activation_bits is None:
        return
    geometry = mixer.geometry
    fitting = min(CLUSTERS, geometry.heads_per_group), min(CLUSTERS, geometry.head_dim)
    clusters = spec.clusters or fitting
    order = reorder_mixer(block, name, mixer, clusters, config.statistic, _PARTITIONS[config.clustering])
    chosen = replace(spec, head_clusters=clusters[0], channel_clusters=clusters[1])
    mixer.layer_spec = replace(mixer.layer_spec, mixer=chosen)
    mixer.set_clusters(order.head_ends, order.channel_ends)


def _takes_gptq(matrix: Matrix, config: Quamba2Config) -> bool:
    """Linear layers alone; convolutions are depthwise."""
    is_asked = matrix.spec.bits < 8 if config.weights is None else config.weights == "gptq"
    return is_asked and matrix.skeleton.kind == "linear"
