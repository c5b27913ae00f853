"""From scores to a choice: allocations of every budget and ratio, and the one whose pictures are nearest."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack

import numpy as np

from hf_lowbit.allocation.coupled_groups import TOLERANCE, Allocation, ScoredLayer, candidates, reachable
from hf_lowbit.calibration.progress import Progress
from hf_lowbit.search.pipeline.groups import CONTENT, QUALITY
from hf_lowbit.search.pipeline.result import FULL, Candidate
from hf_lowbit.search.pipeline.sensitivity import Sensitivity, scored
from hf_lowbit.search.pipeline.settings import Settings
from hf_lowbit.search.pipeline.subjects import Subject

Changed = Callable[[], AbstractContextManager[None]]
_BELOW = 0.3  # how far below the target budgets are tried, in bits: the paper's
_WEIGHT_RATIOS, _INPUT_RATIOS = (0.46, 1.36), (0.94, 1.09)  # likewise: content's budget over quality's


def choose_weights(
    subjects: Sequence[Subject],
    scores: Mapping[str, Mapping[int, float]],
    settings: Settings,
    sensitivity: Sensitivity,
) -> tuple[dict[str, int], list[Candidate]]:
    """Layer -> bits of its weights, and what was drawn to choose them.

    Raises:
        AllocationError: no allocation has the budget.
    """
    sizes = {subject.name: subject.elements for subject in subjects}
    layers = scored(subjects, sizes, scores, settings.objective)
    found = _allocations(subjects, layers, settings.bits_per_weight, _WEIGHT_RATIOS, settings.scan)
    return _nearest_pictures("weights", found, lambda bits: [sensitivity.with_weights(bits, subjects)], sensitivity)


def choose_inputs(
    subjects: Sequence[Subject],
    scores: Mapping[str, Mapping[int, float]],
    settings: Settings,
    sensitivity: Sensitivity,
    weights: Mapping[str, int],
) -> tuple[dict[str, int], list[str], list[Candidate]]:
    """Layer -> bits of its inputs, layers that keep theirs in full precision, and what was drawn; weights are fixed.

    Raises:
        AllocationError: no allocation has the budget.
    """
    able = [subject for subject in subjects if scores[subject.name]]
    if settings.bits_per_input is None or not able:
        return {}, [], []
    free = [subject for subject in able if subject.inputs == tuple(sorted(set(settings.input_candidates)))]
    protected = _most_sensitive(free, scores, settings.protect)
    rest = [subject for subject in able if subject.name not in protected]
    sizes = {subject.name: sensitivity.ranges[subject.name].size for subject in able}
    layers = scored(rest, sizes, scores, settings.objective)
    target = _target_of_rest(settings.bits_per_input, sizes, protected, reachable(layers)[1])
    found = _allocations(rest, layers, target, _INPUT_RATIOS, settings.scan)
    fixed = sensitivity.with_weights(weights, subjects)
    inputs, drawn = _nearest_pictures(
        "inputs", found, lambda bits: [fixed, sensitivity.with_inputs(bits)], sensitivity, sorted(weights.items())
    )
    return inputs, protected, drawn


def _allocations(
    subjects: Sequence[Subject],
    layers: Sequence[ScoredLayer],
    target: float,
    ratios: tuple[float, float],
    counts: tuple[int, int],
) -> list[tuple[dict[str, int], Allocation]]:
    """Layer -> bits, for every distinct allocation of the scan; equal budgets are always among the ratios [ours].

    Args:
        layers: of the subjects, in their order.
        counts: of budgets and ratios.

    Raises:
        AllocationError: none is possible.
    """
    budgets = _budgets(target, reachable(layers), counts[0])
    scan = sorted({1.0, *np.linspace(*ratios, counts[1]).tolist()}) if len(budgets) > 1 < counts[1] else [1.0]
    names, parts = {}, {}
    for group in (CONTENT, QUALITY):
        own = [i for i, subject in enumerate(subjects) if subject.group == group]
        names[group], parts[group] = [subjects[i].name for i in own], [layers[i] for i in own]
    found = candidates(parts[CONTENT], parts[QUALITY], target, budgets, scan)
    ordered = [*names[CONTENT], *names[QUALITY]]
    return [(dict(zip(ordered, (*one.first, *one.second), strict=True)), one) for one in found]


def _budgets(target: float, extremes: tuple[float, float], count: int) -> list[float]:
    """From below the target up to it, less what the mean may lie above a budget, which the best choice makes use of."""
    least, most = extremes
    if target >= most:  # there is one best choice
        return [most]
    highest = max(least, target - TOLERANCE)
    lowest = max(least, target - _BELOW)
    return [highest] if count == 1 or lowest >= highest else np.linspace(highest, lowest, count).tolist()


def _nearest_pictures(
    what: str,
    found: Sequence[tuple[dict[str, int], Allocation]],
    changed: Callable[[dict[str, int]], Sequence[Changed]],
    sensitivity: Sensitivity,
    fixed: object = None,
) -> tuple[dict[str, int], list[Candidate]]:
    """The allocation with the least squared difference of pixels, and all that were drawn; one alone is not drawn.

    Args:
        what: "weights" or "inputs".
        changed: bits -> the contexts in which the model has them.
        fixed: what else the pictures depend on.
    """
    if len(found) == 1:
        return found[0][0], []
    drawn: list[Candidate] = []
    progress = Progress(len(found), "candidate")
    for bits, one in found:
        key = f"{what} {hashlib.sha256(json.dumps([fixed, sorted(bits.items())]).encode()).hexdigest()[:24]}"

        def measure(bits: dict[str, int] = bits) -> float:
            with ExitStack() as stack:
                for context in changed(bits):
                    stack.enter_context(context())
                return sensitivity.judge.pixel_error()

        restored = key in sensitivity.known
        error = sensitivity.known.get(key, measure)
        drawn.append(Candidate(what, one.budget, one.ratio, one.mean, error))
        progress.step(f"{what} of {one.mean:.3f} bits, ratio {one.ratio:.2f}: error {error:.3g}", restored)
    best = min(range(len(drawn)), key=lambda i: drawn[i].pixel_error)
    return found[best][0], drawn


def _most_sensitive(subjects: Sequence[Subject], scores: Mapping[str, Mapping[int, float]], share: float) -> list[str]:
    """The layers of each group with the lowest scores at their largest width: a share of the group, rounded up."""
    worst: list[str] = []
    for group in (CONTENT, QUALITY):
        own = [subject.name for subject in subjects if subject.group == group and scores[subject.name]]
        own.sort(key=lambda name: scores[name][max(scores[name])])
        worst += own[: math.ceil(share * len(own) - 1e-9)]
    return worst


def _target_of_rest(target: float, sizes: Mapping[str, int], protected: Sequence[str], most: float) -> float:
    """Mean bits of what is not protected, so that all have the target with 16 for those that are; at most ``most``."""
    total, apart = sum(sizes.values()), sum(sizes[name] for name in protected)
    return min(most, (target * total - FULL * apart) / (total - apart)) if total > apart else most
