"""Two processes, each with half of the data, gather the statistics of one with all of it."""

from __future__ import annotations

from pathlib import Path

import torch

import hf_lowbit
from hf_lowbit.calibration.block import Block
from hf_lowbit.calibration.walk import Walk
from hf_lowbit.plan import build_plan
from hf_lowbit.rounding import round_to_nearest
from hf_lowbit.tensorwise import pack_parameter
from tests.calibration.processes import run_in_two
from tests.matrix.models import MODELS, fingerprint


def gather(folder: Path, name: str) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = MODELS["llama"].build().eval()
    batches = [{"input_ids": torch.randint(0, 250, (2, 16))} for _ in range(4)]
    sums: dict[str, torch.Tensor] = {}

    def step(block: Block) -> None:
        for key, hessian in block.hessians().items():
            sums[f"{block.name}.{key}"] = hessian.matrix
            block.pack(key, round_to_nearest(block.matrices[key].weight, block.matrices[key].spec))

    plan = build_plan(model, hf_lowbit.RTNConfig(bits=4, group_size=32))
    Walk(model, plan.layers, step, batches, pack_parameter).run()
    torch.save((sums, fingerprint(model)), folder / name)


def test_two_processes_sum_to_one(tmp_path: Path) -> None:
    run_in_two(gather, tmp_path)
    gather(tmp_path, "alone")
    alone, bits = torch.load(tmp_path / "alone")
    for rank in range(2):
        sums, theirs = torch.load(tmp_path / f"rank{rank}")
        assert sums.keys() == alone.keys() and theirs == bits
        for name, expected in alone.items():
            assert (sums[name] - expected).norm() <= 1e-6 * expected.norm(), name
