"""Perplexity and divergence against values computed another way on whole logits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from hf_lowbit.evaluation import logits as logits_module
from hf_lowbit.evaluation import measure_divergence, measure_perplexity, split_windows
from tests.evaluation.tiny import VOCABULARY, tiny_llama

IDS = torch.arange(50).mul(7).remainder(VOCABULARY).tolist()
WINDOWS = split_windows(IDS, 12, bos_token_id=0)


@pytest.fixture(autouse=True, params=["whole windows", "three rows at a time"])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "three rows at a time":
        monkeypatch.setattr(logits_module, "_CHUNK_ELEMENTS", 3 * VOCABULARY + 1)


@torch.no_grad()
def all_logits(model: torch.nn.Module, window: Tensor) -> Tensor:
    return model.eval()(input_ids=window[None]).logits[0, :-1].double()


def test_perplexity_is_exp_of_the_token_weighted_mean() -> None:
    model = tiny_llama()
    losses = [
        torch.nn.functional.cross_entropy(all_logits(model, window), window[1:], reduction="none") for window in WINDOWS
    ]
    assert measure_perplexity(model, WINDOWS) == pytest.approx(math.exp(torch.cat(losses).mean()), rel=1e-5)


def test_perplexity_of_known_probabilities() -> None:
    # The next token id is the last plus one with probability 1/2; the other three share the rest.
    def source(ids: Tensor) -> Tensor:
        probabilities = torch.full((*ids.shape, 4), 1 / 6)
        probabilities.scatter_(-1, ((ids + 1) % 4)[..., None], 1 / 2)
        return probabilities.log() + 3.0

    assert measure_perplexity(source, [torch.tensor([0, 1, 2]), torch.tensor([0, 2])]) == pytest.approx(
        (1 / 2 * 1 / 2 * 1 / 6) ** (-1 / 3), rel=1e-6
    )


def test_divergence_from_itself_is_nothing() -> None:
    model = tiny_llama()
    assert measure_divergence(model, model, WINDOWS) == (0.0, 1.0)


def test_divergence_matches_torch_distributions() -> None:
    model, reference = tiny_llama(0), tiny_llama(1)
    expected_kl, expected_agreement = [], []
    for window in WINDOWS:
        theirs, ours = all_logits(reference, window), all_logits(model, window)
        expected_kl.append(kl_divergence(Categorical(logits=theirs), Categorical(logits=ours)))
        expected_agreement.append((theirs.argmax(-1) == ours.argmax(-1)).double())
    kl, agreement = measure_divergence(model, reference, WINDOWS)

    assert kl == pytest.approx(float(torch.cat(expected_kl).mean()), rel=1e-5)
    assert agreement == pytest.approx(float(torch.cat(expected_agreement).mean()))
    assert kl != pytest.approx(measure_divergence(reference, model, WINDOWS).kl, rel=1e-2)


def test_the_reference_may_be_a_function() -> None:
    model, reference = tiny_llama(0), tiny_llama(1)

    def function(ids: Tensor) -> Tensor:
        return reference.eval()(input_ids=ids).logits

    assert measure_divergence(model, function, WINDOWS) == measure_divergence(model, reference, WINDOWS)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("broken", ["model", "reference"])
def test_logits_that_are_no_numbers_are_an_error(value: float, broken: str) -> None:
    def poisoned(ids: Tensor) -> Tensor:
        result = torch.zeros(*ids.shape, VOCABULARY)
        result[0, -2, 3] = value
        return result

    sources = (poisoned, tiny_llama()) if broken == "model" else (tiny_llama(), poisoned)
    with pytest.raises(FloatingPointError, match=f"window 0: the {broken} gives NaN or infinite"):
        measure_divergence(*sources, WINDOWS)


def test_vocabularies_of_different_sizes_are_an_error() -> None:
    with pytest.raises(ValueError, match=f"{VOCABULARY} and {VOCABULARY + 1}"):
        measure_divergence(tiny_llama(), tiny_llama(vocabulary=VOCABULARY + 1), WINDOWS)


def test_no_window_is_an_error() -> None:
    with pytest.raises(ValueError, match="too short"):
        measure_perplexity(tiny_llama(), [])


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_llama()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    assert measure_perplexity(model, WINDOWS) == measure_perplexity(model, WINDOWS)  # no dropout
    assert [module.training for module in model.modules()] == before
    assert torch.is_grad_enabled()
