"""One row: quantize a copy of the model, and judge it."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections import Counter
from typing import Any

from quality.judge import Judge, summary
from torch import Tensor, nn

from low_rank_rows.rows import Row


def measure(row: Row, rows: dict[str, Row], model: nn.Module, ids: Tensor, judge: Judge) -> dict[str, Any]:
    """Facts of a row: bits per weight, seconds, KL and perplexity; of a search also what it chose."""
    import hf_lowbit
    from hf_lowbit.search import search

    config = _config(row, ids)
    facts: dict[str, Any] = {}
    begun = time.monotonic()
    if row.budget_of is not None:
        budget = bits_of(model, _config(rows[row.budget_of], ids))
        facts["budget"] = budget
        if row.search:
            found = search(model, config, None, budget, **row.search)
            config = found.config
            facts["chosen_bits"] = dict(Counter(group.bits for group in found.groups for _ in group.layers))
            facts["chosen_ranks"] = dict(Counter(rank for group in found.groups for rank in group.ranks.values()))
        else:
            assert config.low_rank is not None
            config = dataclasses.replace(config, low_rank=dataclasses.replace(config.low_rank, budget_bits=budget))
    quantized = hf_lowbit.quantize(copy.deepcopy(model), config)
    facts["seconds"] = time.monotonic() - begun
    report = hf_lowbit.report(quantized)
    facts |= {"bits_per_weight": report.bits_per_weight, "notes": len(report.warnings)}
    if row.budget_of is not None and not row.search:
        facts["chosen_ranks"] = dict(Counter(layer.low_rank for layer in report.layers))
    return {**facts, **summary(judge.score(quantized))}


def bits_of(model: nn.Module, config: Any) -> float:
    """Bits per weight that a config will store, without quantizing."""
    from hf_lowbit.allocation import stored_sizes
    from hf_lowbit.calibration.fusing import tied_groups
    from hf_lowbit.search.options import options_of

    options = options_of(model, config, [config.bits])
    tied = tied_groups(model, {name: planned[0] for name, planned in options.items()})
    sizes = [stored_sizes(model, group, options) for group in tied]
    return sum(size.bits[0] for size in sizes) / sum(size.elements for size in sizes)


def _config(row: Row, ids: Tensor) -> Any:
    import hf_lowbit

    method = hf_lowbit.methods()[row.method]
    data = {"dataset": ids, "num_samples": len(ids), "sequence_length": ids.shape[1]}
    return method.config_class(**row.fields, **data)
