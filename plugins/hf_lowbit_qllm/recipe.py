"""The recipe of QLLM: reassemble every site of a block, train its correction, fuse it, round to nearest."""

from __future__ import annotations

import torch

from hf_lowbit.calibration.block import Block
from hf_lowbit.calibration.correction import CorrectionPlan, correct
from hf_lowbit.calibration.reassembling import Similarity, linear_layers, reassembly_sites, search_reassembly
from hf_lowbit.method import Recipe
from hf_lowbit.rounding import round_to_nearest
from hf_lowbit_qllm.config import QLLMConfig


def make_recipe(config: QLLMConfig) -> Recipe:
    """Experts, convolutions and embeddings are rounded to nearest; the correction is trained with them as they are."""

    @torch.no_grad()
    def calibrate(block: Block) -> None:
        layers = linear_layers(block)
        if config.channel_ratio > 0:
            reassemble(block, config)
        for key, matrix in block.matrices.items():
            if matrix.layer not in layers:
                block.pack(key, round_to_nearest(matrix.weight, matrix.spec))
        if config.epochs and layers:
            correct(block, layers, correction_plan(config))
        for key in block.unpacked:
            matrix = block.matrices[key]
            block.pack(key, round_to_nearest(matrix.weight, matrix.spec))

    return Recipe(calibrate=calibrate, targets=config.epochs > 0)


def correction_plan(config: QLLMConfig) -> CorrectionPlan:
    """How the correction of every block is trained."""
    return CorrectionPlan(
        rank=config.lora_rank,
        alpha=config.lora_alpha,
        epochs=config.epochs,
        learning_rate=config.learning_rate,
        train_norms=config.train_norms,
    )


def reassemble(block: Block, config: QLLMConfig) -> None:
    """Search the threshold of every site, one after the other; layers before it are float still."""
    sites = reassembly_sites(block)
    prefix = {name: f"{name}.weight" if name else "weight" for site in sites for name in site}
    statistics = block.collect(Similarity, set(prefix.values())) if sites else {}
    for site in sites:
        statistic = statistics[prefix[site[0]]]
        if statistic.tokens:
            search_reassembly(block, site, statistic, config.channel_ratio, config.search_steps)
