"""What is compared: names, configs, and the budgets that they share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

METHODS = {"rtn": {}, "gptq": {"search_clip": False}}  # both on grids that reach to the largest weight
BITS = (3, 2)
GROUP = 64
RANKS = (16, 32)
METRICS = ("identity", "mean_abs", "diag", "full")
CANDIDATES = (2, 3, 4, 8)
JOINT_RANKS = (0, 8, 16, 32)


@dataclass(frozen=True)
class Row:
    """One way to quantize.

    Attributes:
        name: of the row.
        series: of the line in the picture.
        method: of hf_lowbit.
        fields: of its config.
        budget_of: the row whose bits per weight are the budget of a search; None without one.
        search: arguments of the search.
    """

    name: str
    series: str
    method: str
    fields: dict[str, Any]
    budget_of: str | None = None
    search: dict[str, Any] = field(default_factory=dict)


def branch(method: str, bits: int, rank: int, metric: str, factor_bits: int, iterations: int = 1) -> Row:
    """Every layer with one rank."""
    turns = "" if iterations == 1 else f"-i{iterations}"
    low_rank = {"rank": rank, "metric": metric, "factor_bits": factor_bits, "iterations": iterations}
    return Row(
        f"{method}-{bits}-r{rank}-{metric}-f{factor_bits}{turns}",
        f"{method}, {metric}, {factor_bits}-bit factors{f', {iterations} turns' if turns else ''}",
        method,
        {"bits": bits, "group_size": GROUP, "low_rank": low_rank},
    )


def all_rows() -> dict[str, Row]:
    """By name, those that others take their budgets from first."""
    return {row.name: replace(row, fields={**METHODS[row.method], **row.fields}) for row in _rows()}


def _rows() -> Iterator[Row]:
    for method in METHODS:
        for bits in BITS:
            for group in (64, 32, 16):
                fields = {"bits": bits, "group_size": group}
                yield Row(f"{method}-{bits}-g{group}", f"{method}, {bits} bits, groups of 64 to 16", method, fields)
        yield Row(f"{method}-4-g64", f"{method}, 4 bits", method, {"bits": 4, "group_size": GROUP})
        for bits in BITS:
            for rank in RANKS:
                for factor_bits in (16, 8):
                    for metric in METRICS:
                        yield branch(method, bits, rank, metric, factor_bits)
                yield branch(method, bits, rank, "full", 4)
                if method == "rtn":
                    for metric in ("identity", "full"):
                        yield branch(method, bits, rank, metric, 16, iterations=5)
    for method in METHODS:
        for bits in BITS:
            for rank in RANKS:
                for factor_bits in (16, 8):
                    yield from _within(method, bits, rank, factor_bits)


def _within(method: str, bits: int, rank: int, factor_bits: int) -> Iterator[Row]:
    """The same total, spent otherwise."""
    same = branch(method, bits, rank, "full", factor_bits)
    where = f"as-{bits}-r{rank}-f{factor_bits}"
    part = {"rank": 2 * rank, "metric": "full", "factor_bits": factor_bits}
    fields = {"group_size": GROUP}
    yield Row(
        f"{method}-ranks-{where}", f"{method}, full, ranks of a budget, {factor_bits}-bit factors", method,
        {**fields, "bits": bits, "low_rank": part}, same.name,
    )  # fmt: skip
    yield Row(
        f"{method}-mixed-{where}", f"{method}, bits of a budget", method, fields, same.name,
        {"candidates": CANDIDATES},
    )  # fmt: skip
    yield Row(
        f"{method}-joint-{where}", f"{method}, bits and ranks of a budget, {factor_bits}-bit factors", method,
        {**fields, "low_rank": {**part, "rank": max(JOINT_RANKS)}}, same.name,
        {"candidates": CANDIDATES, "ranks": JOINT_RANKS},
    )  # fmt: skip
