"""Percentiles of |x|: of samples, in a running mean, and of all data."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from hf_lowbit.calibration.parallel import combine, share
from hf_lowbit.calibration.percentile import Observer, OverallPercentile, RunningPercentile, magnitude_quantile
from tests.calibration.processes import run_in_two


def samples(count: int = 6) -> list[torch.Tensor]:
    """``[1, 40, 8]`` each, the later the larger."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 40, 8, generator=generator) * (1 + index) for index in range(count)]


@pytest.mark.parametrize("percentile", [0.1, 37.5, 50.0, 99.0, 99.999, 100.0])
def test_the_quantile_is_that_of_torch(percentile: float) -> None:
    x = torch.cat(samples()).flatten(1)
    expected = x.abs().double().quantile(percentile / 100, dim=1).float()
    torch.testing.assert_close(magnitude_quantile(x, percentile), expected)


def test_more_values_than_torch_takes() -> None:
    x = torch.arange(2**24 + 8, dtype=torch.int32).float().unsqueeze(0)
    with pytest.raises(RuntimeError, match="too large"):
        x.quantile(0.5)
    assert magnitude_quantile(-x, 50.0).item() == pytest.approx(2**23 + 3.5, abs=1)


# Quamba, test 4
def test_all_of_the_last_sample() -> None:
    observer = RunningPercentile(100.0, 1.0)
    for x in samples():
        observer.update(x)
    assert observer.limit.item() == samples()[-1].abs().max().item()


# Quamba, test 4
def test_all_of_all_data_is_the_largest() -> None:
    observer = OverallPercentile(100.0)
    for x in samples():
        observer.update(x)
    assert observer.limit.item() == torch.cat(samples()).abs().max().item()


def test_a_share_of_all_data() -> None:
    observer = OverallPercentile(99.0)
    for x in samples():
        observer.update(x)
    exact = torch.cat(samples()).abs().quantile(0.99).item()
    assert exact <= observer.limit.item() <= exact * (1 + 2**-6)


def test_the_first_sample_starts_the_mean_and_the_order_counts() -> None:
    def limit(given: list[torch.Tensor], sigma: float) -> float:
        observer = RunningPercentile(90.0, sigma)
        for x in given:
            observer.update(x)
        return observer.limit.item()

    quantiles = [magnitude_quantile(x.flatten(1), 90.0).item() for x in samples()]
    expected = quantiles[0]
    for quantile in quantiles[1:]:
        expected = 0.75 * expected + 0.25 * quantile
    assert limit(samples(), 0.25) == pytest.approx(expected, rel=1e-6)
    assert limit(samples()[::-1], 0.01) > 3 * limit(samples(), 0.01), "of a hundred samples the first decides"
    assert limit([torch.cat(samples())], 0.25) == pytest.approx(expected, rel=1e-6), "six samples of one batch"


def test_nothing_seen() -> None:
    for observer in (RunningPercentile(90.0, 0.1), OverallPercentile(90.0)):
        observer.update(torch.zeros(0, 40, 8))
        assert observer.tokens == 0


def _limits(given: list[torch.Tensor]) -> list[float]:
    observers: list[Observer] = [RunningPercentile(90.0, 0.25), OverallPercentile(90.0)]
    for x in given:
        for observer in observers:
            observer.update(x)
    combine(observers)
    return [observer.limit.item() for observer in observers]


def _in_process(folder: Path, name: str) -> None:
    torch.save(_limits(share(samples(5))), folder / name)
    dist.barrier()


def test_two_processes_find_what_one_does(tmp_path: Path) -> None:
    run_in_two(_in_process, tmp_path)
    for name in ("rank0", "rank1"):
        assert torch.load(tmp_path / name) == _limits(samples(5))
