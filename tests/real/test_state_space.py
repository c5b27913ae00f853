"""Quamba and Quamba2 on the trained Mamba models: quality in one pass and through quantized states, size, reload."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_lowbit
from hf_lowbit.evaluation import measure_divergence
from tests.matrix.models import fingerprint

pytestmark = pytest.mark.real
ASSETS = Path(__file__).parents[1] / "assets"
FOLDERS = {"mamba": ASSETS / "mamba-debian", "mamba2": ASSETS / "mamba2-debian"}
LENGTH, PROMPT = 128, 32  # tokens of a window, and of its beginning, which is read in one pass
DATA = {"dataset": str(ASSETS / "debian-text" / "calibration.txt"), "num_samples": 8, "sequence_length": 256}


@pytest.fixture(scope="module")
def windows() -> Tensor:
    """[4, LENGTH] of the held-out text; both models have one tokenizer."""
    text = (ASSETS / "debian-text" / "held_out.txt").read_text(encoding="utf-8")
    ids = AutoTokenizer.from_pretrained(FOLDERS["mamba"])(text[:4000], add_special_tokens=False)["input_ids"]
    return torch.tensor(ids[: 4 * LENGTH]).reshape(4, LENGTH)


@pytest.fixture(scope="module")
def references() -> dict[str, Any]:
    return {name: load(name) for name in FOLDERS}


def load(name: str, config: Any = None) -> Any:
    arguments = {} if config is None else {"quantization_config": config}
    return AutoModelForCausalLM.from_pretrained(FOLDERS[name], dtype=torch.float32, **arguments).eval()


@torch.no_grad()
def token_by_token(model: Any, windows: Tensor) -> Tensor:
    """Logits [windows, LENGTH - PROMPT + 1, vocabulary] after the prompt and after every token that follows it."""
    output = model(windows[:, :PROMPT], use_cache=True)
    logits, cache = [output.logits[:, -1:]], output.cache_params
    for place in range(PROMPT, LENGTH):
        logits.append(model(windows[:, place : place + 1], cache_params=cache, use_cache=True).logits)
    return torch.cat(logits, 1)


def divergences(model: Any, reference: Any, windows: Tensor) -> tuple[float, float]:
    """KL to the float model: in one pass, and token by token."""
    own, other = iter(token_by_token(model, windows)), iter(token_by_token(reference, windows))
    decoded = measure_divergence(
        lambda _: next(own).unsqueeze(0), lambda _: next(other).unsqueeze(0), list(windows[:, PROMPT - 1 :])
    )
    return measure_divergence(model, reference, list(windows)).kl, decoded.kl


def test_quamba2_on_mamba2(references: dict[str, Any], windows: Tensor, tmp_path: Path) -> None:
    """W8A8 is close in one pass and, with clusters, through int8 states; Quamba's one scale for all of them is not."""
    model = load("mamba2", hf_lowbit.Quamba2Config(**DATA))
    report = hf_lowbit.report(model)
    assert not [name for name in report.skipped if "mixer" in name], "the whole mixer is packed"
    close = divergences(model, references["mamba2"], windows)
    one_scale = load("mamba2", hf_lowbit.QuambaConfig(any_generation=True, **DATA))
    far = divergences(one_scale, references["mamba2"], windows)
    print(f"quamba2 W8A8: KL {close}; quamba: {far}")
    assert close[0] < 0.01 and close[1] < 0.05
    assert far[1] > 3 * close[1]
    model.save_pretrained(tmp_path / "packed")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert fingerprint(again) == fingerprint(model)
    assert torch.equal(token_by_token(again.eval(), windows), token_by_token(model, windows))


def test_the_parts_of_quamba_are_worth_it(references: dict[str, Any], windows: Tensor) -> None:
    """Naive static W8A8 is far behind: in one pass it lacks the Hadamard matrix, through the cache also the clip."""
    naive = {"percentile": 100.0, "state_percentile": 100.0, "percentile_sigma": None, "hadamard": False}
    found = [
        divergences(load("mamba", hf_lowbit.QuambaConfig(**DATA, **fields)), references["mamba"], windows)
        for fields in ({}, naive)
    ]
    print(f"quamba W8A8: KL {found[0]}; naive: {found[1]}")
    assert found[0][0] < 0.015
    assert found[1][0] > 5 * found[0][0] and found[1][1] > 3 * found[0][1]


def test_four_bits(references: dict[str, Any], windows: Tensor) -> None:
    """GPTQ of Quamba2 is ahead of rounding to nearest at the same bits."""
    config = hf_lowbit.Quamba2Config(bits=4, activation_bits=None, **DATA)
    model, nearest = load("mamba", config), load("mamba", hf_lowbit.RTNConfig(bits=4, group_size=128))
    found = [divergences(own, references["mamba"], windows)[0] for own in (model, nearest)]
    print(f"4 bits: KL {found[0]:.4f} by quamba2, {found[1]:.4f} by rtn")
    assert hf_lowbit.report(model).bits_per_weight < 4.5
    assert found[0] < 0.9 * found[1]
