"""One solver for every metric: exact at the limits, best by the singular values, ordered on its own data."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from hf_lowbit.compensation import (
    diag_weighting,
    low_rank_factors,
    mean_abs_weighting,
    remaining_errors,
    tail_energies,
    weighted_error,
)

SHAPES = [(12, 20), (20, 12), (16, 16)]
METRICS = ["identity", "mean_abs", "diag", "full"]


def problem(shape: tuple[int, ...], tokens: int = 100, seed: int = 0) -> tuple[Tensor, Tensor]:
    """An error, and inputs whose channels are correlated and of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    columns = shape[-1]
    sizes = torch.logspace(-1.5, 1.5, columns)
    mixed = torch.eye(columns) + 0.5 * torch.randn(columns, columns, generator=generator)
    inputs = torch.randn(tokens, columns, generator=generator) @ mixed * sizes
    return torch.randn(shape, generator=generator), inputs


def weighting(metric: str, inputs: Tensor) -> Tensor | None:
    moment = inputs.T @ inputs / len(inputs)
    return {
        "identity": None,
        "mean_abs": mean_abs_weighting(inputs.abs().mean(0)),
        "diag": diag_weighting(inputs.square().mean(0)),
        "full": moment,
    }[metric]


def output_error(error: Tensor, factors: tuple[Tensor, Tensor], inputs: Tensor) -> float:
    a, b = factors
    return (inputs.double() @ (error - b @ a).double().T).square().sum(-1).mean().item()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("metric", METRICS)
def test_full_rank_is_exact_and_rank_zero_is_nothing(shape: tuple[int, int], metric: str) -> None:
    error, inputs = problem(shape)
    a, b = low_rank_factors(error, min(shape), weighting(metric, inputs))
    assert a.dtype == b.dtype == torch.float32
    assert torch.allclose(b @ a, error, atol=1e-4)
    a, b = low_rank_factors(error, 0, weighting(metric, inputs))
    assert a.shape == (0, shape[1]) and b.shape == (shape[0], 0) and not (b @ a).any()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("metric", METRICS)
def test_what_is_left_is_the_tail_of_the_spectrum(shape: tuple[int, int], metric: str) -> None:
    """Eckart and Young, against a singular value decomposition of E S."""
    error, inputs = problem(shape)
    own = weighting(metric, inputs)
    root = torch.eye(shape[1]) if own is None else own.diag() if own.dim() == 1 else None
    if root is None:
        root = torch.linalg.cholesky(own.double())  # S up to an orthogonal factor on its right, which changes nothing
    singular = torch.linalg.svdvals(error.double() @ root.double())
    tails, tolerance = tail_energies(error, own), 1e-6 * singular[0].item() ** 2
    for rank in range(min(shape) + 1):
        a, b = low_rank_factors(error, rank, own)
        expected = singular[rank:].square().sum().item()
        assert weighted_error(error - b @ a, own).item() == pytest.approx(expected, rel=1e-4, abs=tolerance)
        assert tails[rank].item() == pytest.approx(expected, rel=1e-4, abs=tolerance)
    assert (tails.diff() <= 0).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_diag_is_full_where_inputs_are_uncorrelated(shape: tuple[int, int]) -> None:
    error, inputs = problem(shape)
    powers = inputs.square().mean(0)
    products = [b @ a for a, b in (low_rank_factors(error, 3, w) for w in (powers.sqrt(), powers.diag()))]
    assert torch.allclose(*products, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_metrics_that_know_more_of_the_inputs_lose_less_on_them(shape: tuple[int, int]) -> None:
    for seed in range(5):
        error, inputs = problem(shape, seed=seed)
        for rank in (1, 4, 8):
            left = {
                m: output_error(error, low_rank_factors(error, rank, weighting(m, inputs)), inputs) for m in METRICS
            }
            assert left["full"] < min(left["diag"], left["mean_abs"]) < left["identity"]
            tails = tail_energies(error, weighting("full", inputs))  # with a floor under rare directions
            assert left["full"] == pytest.approx(tails[rank].item(), rel=1e-3, abs=1e-5 * tails[0].item())


@pytest.mark.parametrize("metric", METRICS)
def test_the_error_falls_with_the_rank(metric: str) -> None:
    error, inputs = problem((12, 20))
    own = weighting(metric, inputs)
    left = [weighted_error(error - b @ a, own).item() for a, b in (low_rank_factors(error, r, own) for r in range(13))]
    assert all(next_ < last for last, next_ in itertools.pairwise(left))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dead", [1, 8])
def test_fewer_tokens_than_channels_and_dead_channels_stay_solvable(shape: tuple[int, int], dead: int) -> None:
    """R without full rank: the factors are finite, and full rank is still exact on weights that no input reads."""
    error, inputs = problem(shape, tokens=4)
    inputs[:, :dead] = 0
    for metric in METRICS:
        own = weighting(metric, inputs)
        for rank in (2, min(shape)):
            a, b = low_rank_factors(error, rank, own)
            assert a.isfinite().all() and b.isfinite().all()
        assert torch.allclose(b @ a, error, atol=1e-2)
    a, b = low_rank_factors(error, 4, weighting("full", inputs))
    assert output_error(error, (a, b), inputs) < 1e-6 * output_error(error, (a[:0], b[:, :0]), inputs)


def test_both_factors_of_a_rank_have_the_same_norm_and_fit_half_precision() -> None:
    error, inputs = problem((16, 16))
    inputs[:, 3] *= 1e4
    for metric in METRICS:
        a, b = low_rank_factors(error, 8, weighting(metric, inputs))
        assert torch.allclose(a.norm(dim=1), b.norm(dim=0), rtol=1e-5)
        assert max(a.abs().max(), b.abs().max()) < 100


def test_a_stack_is_solved_matrix_by_matrix() -> None:
    errors, inputs = problem((3, 12, 20))
    moment = weighting("full", inputs)
    assert moment is not None
    moments = torch.stack([moment, moment.diagonal().diag(), torch.eye(20)])
    diagonals = torch.rand(3, 1, 20) + 0.1
    for own in (None, moment, moments, moment.diagonal().sqrt(), diagonals):
        a, b = low_rank_factors(errors, 4, own)
        assert a.shape == (3, 4, 20) and b.shape == (3, 12, 4)
        for index, error in enumerate(errors):
            each = own if own is None or own.dim() < 3 else own[index]
            alone = low_rank_factors(error, 4, each)
            assert torch.allclose(b[index] @ a[index], alone[1] @ alone[0], atol=1e-4)


def test_zero_errors_and_inputs_that_are_all_zero() -> None:
    a, b = low_rank_factors(torch.zeros(8, 12), 3)
    assert not (b @ a).any() and a.isfinite().all() and b.isfinite().all()
    error, _ = problem((8, 12))
    plain, unread = low_rank_factors(error, 3), low_rank_factors(error, 3, torch.zeros(12, 12))
    assert torch.allclose(plain[1] @ plain[0], unread[1] @ unread[0])


@pytest.mark.parametrize(
    ("rank", "own", "said"),
    [
        (9, None, "rank 9 exceeds"),
        (-1, None, "rank -1"),
        (2, torch.ones(8), "does not fit"),
        (2, torch.ones(8, 8), "does not fit"),
        (2, torch.full((12,), torch.nan), "NaN"),
    ],
)
def test_what_cannot_be_is_refused(rank: int, own: Tensor | None, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        low_rank_factors(torch.randn(8, 12), rank, own)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("branches", [1, 2])
def test_losses_of_ranks_are_what_their_factors_leave_of_the_output(metric: str, branches: int) -> None:
    error, inputs = problem((16, 12))
    moment = inputs.T @ inputs / len(inputs)
    ranks = (0, 2, 5, 8)
    found = remaining_errors(error, ranks, metric, moment, branches)
    own = weighting("diag" if metric == "mean_abs" else metric, inputs)
    for rank, left in zip(ranks, found, strict=True):
        parts = [(part, low_rank_factors(part, rank, own)) for part in error.chunk(branches)]
        assert left == pytest.approx(sum(output_error(*part, inputs) for part in parts), rel=1e-3, abs=1e-5 * found[0])
    assert remaining_errors(error, (0,), metric, moment)[0] == pytest.approx(found[0])
