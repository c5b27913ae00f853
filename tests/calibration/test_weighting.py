"""Statistics of inputs become the weightings of the metrics, the same however the tokens are cut into batches."""

from __future__ import annotations

import pytest
import torch

from hf_lowbit.calibration.statistics import Magnitude
from hf_lowbit.calibration.weighting import statistic_for, weighting_of
from hf_lowbit.compensation import METRICS

INPUTS = torch.randn(60, 8, generator=torch.Generator().manual_seed(0)) * torch.logspace(-1, 1, 8)


def collected(metric: str, sizes: tuple[int, ...]) -> torch.Tensor | None:
    statistic = statistic_for(metric)(8, torch.device("cpu"))
    for batch in INPUTS.split(sizes):
        statistic.update(batch)
    return weighting_of(statistic)


def test_full_and_diag_are_means_over_tokens() -> None:
    moment = INPUTS.T @ INPUTS / 60
    for sizes in ((60,), (7, 0, 53)):
        full, diag = collected("full", sizes), collected("diag", sizes)
        assert full is not None and torch.allclose(full, moment, rtol=1e-5, atol=1e-5)
        assert diag is not None and torch.allclose(diag, moment.diagonal().sqrt(), rtol=1e-5)


def test_mean_abs_is_the_largest_batch_mean_centred_on_one() -> None:
    """L2QER: over the geometric mean of the least and the largest."""
    means = torch.stack([batch.abs().mean(0) for batch in INPUTS.split(20)]).amax(0)
    found = collected("mean_abs", (20, 20, 20))
    assert found is not None
    assert torch.allclose(found, means / (means.min() * means.max()).sqrt())
    assert (found.min() * found.max()).item() == pytest.approx(1)


def test_channels_that_are_never_read_stay_above_zero() -> None:
    statistic = statistic_for("mean_abs")(3, torch.device("cpu"))
    statistic.update(torch.tensor([[0.0, 1.0, 4.0]]))
    found = weighting_of(statistic)
    assert found is not None and found[0] > 0 and found.isfinite().all()


@pytest.mark.parametrize("metric", [metric for metric in METRICS if metric != "identity"])
def test_without_tokens_nothing_is_weighted(metric: str) -> None:
    assert weighting_of(statistic_for(metric)(8, torch.device("cpu"))) is None


def test_a_statistic_of_no_metric_is_refused() -> None:
    magnitude = Magnitude(8)
    magnitude.update(INPUTS)
    with pytest.raises(TypeError, match="Magnitude weighs no inputs"):
        weighting_of(magnitude)
