"""Calibration on a GPU: a model in the host's memory gets the bits of one that is on the card."""

from __future__ import annotations

import copy
import gc
from pathlib import Path
from typing import Any

import pytest
import torch

import hf_lowbit
from hf_lowbit.formats import WeightSpec, decode
from hf_lowbit.rounding import feedback
from hf_lowbit.rounding.gptq import gptq
from tests.calibration.test_placement import Interrupted, config, weights, without_blocks
from tests.matrix.models import MODELS, fingerprint

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "rtn": ("RTNConfig", {}),
    "gptq": ("GPTQConfig", {}),
    "gptq-order": ("GPTQConfig", {"act_order": True, "search_clip": True, "true_sequential": True}),
    "gptq-head": ("GPTQConfig", {"quantize_lm_head": True, "quantize_embeddings": True}),
    "awq": ("AWQConfig", {}),
    "spqr": ("SpQRConfig", {"symmetric": False}),
    "signround": ("SignRoundConfig", {"iterations": 3}),
    "smoothquant": ("SmoothQuantConfig", {"activation_bits": 8}),
    "static": ("RTNConfig", {"activation_bits": 8, "activation_static": True}),
}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_LOWBIT_HOME", str(tmp_path / "home"))


@pytest.fixture(scope="module", params=(torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
def whole(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    return MODELS["llama"].build().to(request.param).eval()


def asked(name: str) -> Any:
    method, values = METHODS[name]
    return config(method, **values)


@pytest.mark.parametrize("name", METHODS)
def test_streamed_it_has_the_bits_of_one_that_is_there(whole: Any, name: str) -> None:
    there, streamed = copy.deepcopy(whole).cuda(), copy.deepcopy(whole)
    hf_lowbit.quantize(there, asked(name))
    hf_lowbit.quantize(streamed, asked(name), device="cuda")
    assert {p.device.type for p in streamed.parameters()} == {"cpu"}
    assert fingerprint(streamed) == fingerprint(there.cpu())


def test_blocks_made_when_they_are_reached_have_them_too(whole: Any) -> None:
    streamed, partial = copy.deepcopy(whole), without_blocks(whole)
    hf_lowbit.quantize(streamed, config(), device="cuda")
    hf_lowbit.quantize(partial, config(), device="cuda", weights=weights(whole))
    assert fingerprint(partial) == fingerprint(streamed)


def test_spilled_activations_come_back_to_the_card(whole: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    streamed, spilled, there = copy.deepcopy(whole), copy.deepcopy(whole), copy.deepcopy(whole).cuda()
    hf_lowbit.quantize(streamed, config(), device="cuda")
    monkeypatch.setattr("hf_lowbit.engine.default_limit", lambda: 0)
    hf_lowbit.quantize(spilled, config(), device="cuda")
    hf_lowbit.quantize(there, config())
    assert fingerprint(streamed) == fingerprint(spilled) == fingerprint(there.cpu())


def allocated() -> int:
    """Bytes of the card that something other than a cycle of references holds."""
    gc.collect()
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


def test_nothing_stays_on_the_card(whole: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_lowbit.calibration.progress import Progress

    before, model = fingerprint(whole), copy.deepcopy(whole)

    def interrupted(*_: Any) -> None:
        raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "step", interrupted)
        with pytest.raises(Interrupted):
            hf_lowbit.quantize(model, config(), device="cuda")
    assert fingerprint(model) == before and {p.device.type for p in model.parameters()} == {"cpu"}
    held = allocated()
    hf_lowbit.quantize(model, config(), device="cuda")
    assert allocated() <= held + 4096


@pytest.mark.parametrize("precision", ("highest", "high"))
@pytest.mark.parametrize("values", ({"bits": 4}, {"bits": 3, "symmetric": False}, {"format": "nf", "bits": 4}))
def test_the_fused_sweep_is_the_loop(values: dict[str, Any], precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(2000, 512, device="cuda", generator=generator)
    x = x @ torch.randn(512, 512, device="cuda", generator=generator)
    weight, hessian = torch.randn(300, 512, device="cuda", generator=generator), x.t() @ x / 2000
    spec = WeightSpec(group_size=64, **values)
    torch.set_float32_matmul_precision(precision)
    try:
        fused = gptq(weight, spec, hessian, block_size=256)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision("highest")
    monkeypatch.setattr(feedback, "runs_on", lambda device: False)
    looped = gptq(weight, spec, hessian)
    assert abs(fused.loss - looped.loss) <= 1e-3 * looped.loss
    differing = (decode(fused.packed) != decode(looped.packed)).float().mean()
    assert differing < 0.01  # halves fall either way in the last bit, and what follows goes along
