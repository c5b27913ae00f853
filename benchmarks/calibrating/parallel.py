"""Two processes with half of the data each, against one."""

from __future__ import annotations

import argparse
import hashlib
import os
import time
from typing import Any

import torch
from torch import Tensor

from calibrating.models import settings, whole


def parallel(options: argparse.Namespace) -> dict[str, Any] | None:
    """Hessians of two processes against those of one, and the codes that GPTQ makes of them."""
    import torch.distributed as dist

    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    dist.init_process_group(options.backend)
    rank, count = dist.get_rank(), dist.get_world_size()
    shape, samples = options.shape or "small", min(options.samples, 32)
    hessians(shape, count)  # so that no start of a library or a kernel is timed
    sums, seconds = hessians(shape, samples)
    codes = packed(shape, samples)
    digests: list[Any] = [None] * count
    dist.all_gather_object(digests, hashlib.sha256(b"".join(c.numpy().tobytes() for c in codes.values())).hexdigest())
    dist.barrier()
    dist.destroy_process_group()
    if rank != 0:
        return None
    alone, seconds_alone = hessians(shape, samples)
    codes_alone = packed(shape, samples)
    differences = [float((sums[key] - alone[key]).norm() / alone[key].norm()) for key in alone]
    words = sum(c.numel() for c in codes_alone.values())
    same = sum(int((codes[key] == codes_alone[key]).sum()) for key in codes_alone)
    return {
        "processes": count, "cards": min(count, torch.cuda.device_count()), "shape": shape, "samples": samples,
        "hessians": len(differences),
        "largest_relative_difference": max(differences), "processes_agree": len(set(digests)) == 1,
        "seconds": seconds, "seconds_alone": seconds_alone, "equal_words_of_codes": same / words,
    }  # fmt: skip


def hessians(shape: str, samples: int) -> tuple[dict[str, Tensor], float]:
    """Of every matrix, with blocks rounded to nearest, so that all see the same inputs; and the seconds."""
    from hf_lowbit.calibration.block import Block
    from hf_lowbit.calibration.placement import Placement, as_device
    from hf_lowbit.calibration.walk import Walk
    from hf_lowbit.plan import build_plan
    from hf_lowbit.rounding import round_to_nearest
    from hf_lowbit.tensorwise import pack_parameter

    model, config, sums = whole(shape), settings(samples), {}
    batches = [{"input_ids": row[None]} for row in config.dataset]

    def step(block: Block) -> None:
        for key, hessian in block.hessians().items():
            sums[f"{block.name}.{key}"] = hessian.matrix.cpu()
            block.pack(key, round_to_nearest(block.matrices[key].weight, block.matrices[key].spec))

    plan = build_plan(model, config)
    plan.layers.pop("lm_head", None)
    placement = Placement(model, plan.layers, as_device("cuda"))
    begun = time.monotonic()
    Walk(model, plan.layers, step, batches, pack_parameter, placement=placement).run()
    return sums, time.monotonic() - begun


def packed(shape: str, samples: int) -> dict[str, Tensor]:
    """The codes of GPTQ."""
    import hf_lowbit

    model = whole(shape)
    hf_lowbit.quantize(model, settings(samples), device="cuda")
    return {name: tensor for name, tensor in model.state_dict().items() if tensor.dtype == torch.int32}
