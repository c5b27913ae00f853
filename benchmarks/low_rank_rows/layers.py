"""The order of the metrics on every layer: what each leaves of the output's error on the calibration inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from low_rank_rows.rows import GROUP, METRICS

_SLACK = 1e-4  # of the error: factors are float32


@torch.no_grad()
def layer_errors(model: nn.Module, ids: Tensor, bits: int, rank: int) -> dict[str, dict[str, float]]:
    """Layer -> metric -> tr(E R E^T) after repair, over that before, with R = mean of x x^T of the float model."""
    from hf_lowbit.calibration.weighting import statistic_for, weighting_of
    from hf_lowbit.compensation import low_rank_factors, weighted_error
    from hf_lowbit.formats import WeightSpec, decode
    from hf_lowbit.rounding import round_to_nearest

    layers = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"
    }
    statistics = {
        name: {m: statistic_for(m)(module.in_features, module.weight.device) for m in METRICS[1:]}
        for name, module in layers.items()
    }

    def hook(name: str) -> Any:
        def update(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            for statistic in statistics[name].values():
                statistic.update(args[0].reshape(-1, args[0].shape[-1]).float())

        return update

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in layers.items()]
    for window in ids.split(8):
        model(input_ids=window.to(model.device), use_cache=False)
    for handle in handles:
        handle.remove()
    found: dict[str, dict[str, float]] = {}
    for name, module in layers.items():
        weight = module.weight.float()
        error = weight - decode(round_to_nearest(weight, WeightSpec("int", bits, GROUP)))
        own = statistics.pop(name)
        moment = weighting_of(own["full"])
        before = weighted_error(error, moment).item()
        found[name] = {}
        for metric in METRICS:
            a, b = low_rank_factors(error, rank, None if metric == "identity" else weighting_of(own[metric]))
            found[name][metric] = weighted_error(error - b @ a, moment).item() / before
    return found


def disorder(errors: dict[str, float]) -> str | None:
    """What is wrong with a layer: a metric that leaves less than the optimum, "full"; None where there is none."""
    for metric in METRICS[:-1]:
        if errors["full"] > errors[metric] + _SLACK:
            return f"full leaves {errors['full']:.4f}, {metric} {errors[metric]:.4f}"
    return None


def exceptions(layers: dict[str, dict[str, float]]) -> list[str]:
    """Where the heuristics are not in the usual order, diag <= mean_abs <= identity, which no theorem says."""
    lines = []
    for less, more in (("diag", "mean_abs"), ("mean_abs", "identity"), ("diag", "identity")):
        excess = {name: own[less] / own[more] - 1 for name, own in layers.items() if own[less] > own[more] + _SLACK}
        if excess:
            worst = max(excess, key=excess.__getitem__)
            lines.append(
                f"{less} leaves more than {more} on {len(excess)} of {len(layers)} layers, at most {excess[worst]:.1%} "
                f"more ({worst})"
            )
    return lines
