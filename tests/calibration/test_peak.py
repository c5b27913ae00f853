"""The prediction adds up what it says it adds up."""

from __future__ import annotations

import re

import torch

import hf_lowbit
from hf_lowbit.calibration.peak import predict_peak
from hf_lowbit.calibration.placement import Placement
from hf_lowbit.plan import build_plan
from tests.matrix.models import MODELS


def test_the_parts_make_the_sum_and_the_rest_is_on_disk() -> None:
    model = MODELS["llama"].build()
    layers = build_plan(model, hf_lowbit.RTNConfig(bits=4, group_size=32)).layers
    batches = [{"input_ids": torch.zeros(64, 512, dtype=torch.int64)}] * 4
    whole = predict_peak(model, layers, batches, targets=False, limit=1 << 40)
    assert "activations 32 MB" in whole and "disk" not in whole  # 131072 tokens x 64 channels x 4 bytes
    total, *parts = map(int, re.findall(r"(\d+) MB", whole))
    assert abs(total - sum(parts)) <= 2
    spilled = predict_peak(model, layers, batches, targets=True, limit=8 << 20)
    assert "activations 8 MB (56 MB more on disk)" in spilled


def test_of_two_memories_both_are_told() -> None:
    model = MODELS["llama"].build()
    layers = build_plan(model, hf_lowbit.RTNConfig(bits=4, group_size=32)).layers
    batches = [{"input_ids": torch.zeros(64, 512, dtype=torch.int64)}] * 4
    placement = Placement(model, layers, torch.device("cuda", 0))
    told = predict_peak(model, layers, batches, targets=False, limit=1 << 40, placement=placement)
    assert "on cuda:0" in told and "on cpu" in told
    card, block, statistics, around, host, held, activations = map(int, re.findall(r"(\d+) MB", told))
    assert abs(card - max(around, block + statistics)) <= 1 and abs(host - held - activations) <= 1
    assert activations == 32
