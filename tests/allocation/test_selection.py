"""Every layer gets its own fields from the overrides, and no other layer gets any."""

from __future__ import annotations

import random
from typing import Any

import pytest

from hf_lowbit.allocation.selection import select_exactly
from hf_lowbit.plan.patterns import check_patterns, first_match

NAMES = [
    *(f"model.layers.{i}.{part}" for i in range(12) for part in ("self_attn.q_proj", "mlp.up_proj")),
    *(f"encoder.model.layers.{i}.self_attn.q_proj" for i in range(3)),  # holds the first ones' names
    *(f"model.layers.{i}.mlp.experts.{j}.w1" for i in range(2) for j in range(3)),
    *(f"{i}" for i in range(3)),
    "lm_head",
    "model.lm_head",
    "model.layers.1",
    "a+b.proj",
]


@pytest.mark.parametrize("seed", range(10))
def test_each_layer_gets_its_own_fields(seed: int) -> None:
    chance = random.Random(seed)
    picked = chance.sample(NAMES, chance.randrange(1, len(NAMES)))
    chosen: dict[str, dict[str, Any]] = {name: {"bits": chance.choice([2, 3, 4])} for name in picked}
    overrides = select_exactly(chosen, NAMES)
    check_patterns(overrides)
    for name in NAMES:
        pattern = first_match(overrides, name)
        assert (overrides[pattern] if pattern else None) == chosen.get(name)


def test_patterns_are_few_and_legible() -> None:
    names = [f"model.layers.{i}.{part}" for i in range(100) for part in ("mlp.up_proj", "mlp.down_proj")]
    chosen = {name: {"bits": 2 if ".7." in name or ".9." in name else 4} for name in names[::2]}
    chosen |= {name: {"bits": 8} for name in names[1::2]}
    overrides = select_exactly(chosen, names)
    assert len(overrides) == 3
    assert overrides[r"model\.layers\.(?:7|9)\.mlp\.up_proj"] == {"bits": 2}
    assert overrides[r"model\.layers\.\d+\.mlp\.down_proj"] == {"bits": 8}
