"""The information-elastic connection: IR-QLoRA's formulas, its gradients, and the plain LoRA it is saved as."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.warning import PeftWarning
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

import hf_lowbit
from hf_lowbit import add_elastic_connection, remove_elastic_connection
from hf_lowbit.integrations.elastic import block_average
from tests.matrix.models import MODELS

INPUTS = MODELS["llama"].inputs(torch.float32)


def base(packed: bool = True) -> Any:
    torch.manual_seed(0)
    model = MODELS["llama"].build()
    return hf_lowbit.quantize(model, hf_lowbit.IRQLoRAConfig(tau_steps=3)) if packed else model


def adapted(model: Any, rank: int = 8, **options: Any) -> Any:
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=16, target_modules="all-linear", **options))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(**INPUTS).logits


def train(model: Any, steps: int = 3) -> Any:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**INPUTS).logits.square().mean().backward()
        optimizer.step()
    return model


def betas(model: nn.Module) -> dict[str, float]:
    return {name: p.item() for name, p in model.named_parameters() if name.endswith("beta")}


def connected(x: Tensor, a: Tensor, b: Tensor, beta: tuple[float, float]) -> Tensor:
    """IEC as the authors compute it, for a rank that divides both widths."""
    rank = len(a)
    h = F.linear(x, a) + beta[0] * x.unflatten(-1, (rank, -1)).mean(-1)
    y = F.linear(h, b).unflatten(-1, (rank, -1)) + beta[1] * h.unsqueeze(-1)
    return y.flatten(-2)


# 6
def test_the_connection_is_a_lora_of_other_factors() -> None:
    generator = torch.Generator().manual_seed(0)
    x, a, b = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((5, 48), (8, 48), (32, 8)))
    merged_a, merged_b = a + 0.3 * block_average(8, 48).double(), b - 0.7 * block_average(32, 8).double()
    expected = connected(x, a, b, (0.3, -0.7))
    torch.testing.assert_close(F.linear(F.linear(x, merged_a), merged_b), expected, rtol=1e-6, atol=1e-6)


def test_a_rank_that_divides_neither_width() -> None:
    """6 and 9: three averages of three, each repeated twice; 9 and 6 likewise of two, three times."""
    x = torch.arange(9.0)
    assert torch.equal(block_average(6, 9) @ x, torch.tensor([1.0, 1, 4, 4, 7, 7]))
    assert torch.equal(block_average(9, 6) @ x[:6], torch.tensor([0.5, 0.5, 0.5, 2.5, 2.5, 2.5, 4.5, 4.5, 4.5]))
    assert torch.equal(block_average(1, 4), torch.full((1, 4), 0.25))


# 5
def test_it_starts_as_plain_lora_and_trains() -> None:
    model = adapted(base())
    before = logits(train(model))
    assert len(add_elastic_connection(model)) == 14
    assert torch.equal(logits(model), before)
    train(model)
    assert len(betas(model)) == 28 and all(betas(model).values())
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert not any("lora_" in name for name in frozen)


def test_layers_compute_the_authors_formula() -> None:
    model = adapted(base())
    add_elastic_connection(model)
    train(model)
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.down_proj")
    factors = [getattr(layer, part)["default"].parametrizations.weight for part in ("lora_A", "lora_B")]
    a, b = (factor.original.detach() for factor in factors)
    x = torch.randn(2, 3, 96, generator=torch.Generator().manual_seed(0))
    expected = layer.base_layer(x) + 2 * connected(x, a, b, tuple(factor[0].beta.item() for factor in factors))
    torch.testing.assert_close(layer(x).detach(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "float"])
@pytest.mark.parametrize("rank", [8, 12], ids=["divides", "does not"])
def test_saved_it_is_a_plain_lora(packed: bool, rank: int, tmp_path: Path) -> None:
    model = adapted(base(packed), rank)
    add_elastic_connection(model)
    expected = logits(train(model))
    with warnings.catch_warnings():
        warnings.simplefilter("error", PeftWarning)
        model.save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(base(packed), tmp_path)
    torch.testing.assert_close(logits(plain), expected, rtol=0, atol=1e-6)
    assert not betas(plain)
    again = PeftModel.from_pretrained(base(packed), tmp_path, is_trainable=True)
    add_elastic_connection(again, folder=tmp_path)
    assert betas(again) == betas(model)
    torch.testing.assert_close(logits(again), expected, rtol=0, atol=1e-6)
    assert betas(train(again)) != betas(model)


def test_removed_it_is_a_plain_lora(tmp_path: Path) -> None:
    model = adapted(base())
    add_elastic_connection(model)
    expected = logits(train(model))
    assert len(remove_elastic_connection(model)) == 14 and not remove_elastic_connection(model)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-6)
    model.save_pretrained(tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors")
    assert len(keys) == 28 and all(key.endswith(("lora_A.weight", "lora_B.weight")) for key in keys)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base(), tmp_path)), expected, rtol=0, atol=1e-6)


def test_state_dicts_round_trip() -> None:
    """As Trainer resumes: into a model that has the connection, and into a plain one."""
    model = adapted(base())
    add_elastic_connection(model)
    expected = logits(train(model))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    other = adapted(base())
    add_elastic_connection(other)
    other.load_state_dict(state)
    torch.testing.assert_close(logits(other), expected, rtol=0, atol=1e-6)
    assert betas(other) == betas(model)
    plain = adapted(base())
    assert all(key.endswith("elastic_beta") for key in plain.load_state_dict(state, strict=False).unexpected_keys)
    torch.testing.assert_close(logits(plain), expected, rtol=0, atol=1e-6)


def test_peft_merges_it_and_dora_reads_it() -> None:
    model = adapted(base(packed=False), use_dora=True)
    add_elastic_connection(model)
    expected = logits(train(model))
    torch.testing.assert_close(logits(model.merge_and_unload()), expected, rtol=1e-4, atol=1e-4)


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no linear layer of this LlamaForCausalLM has a LoRA adapter"):
        add_elastic_connection(base(packed=False))
    model = adapted(base(packed=False))
    with pytest.raises(ValueError, match=r"holds no adapter_model\.safetensors"):
        add_elastic_connection(model, folder=tmp_path)
    model = adapted(base(packed=False))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="was not trained with the elastic connection"):
        add_elastic_connection(model, folder=tmp_path)
    model = adapted(base(packed=False))
    add_elastic_connection(model)
    with pytest.raises(ValueError, match="has the elastic connection already"):
        add_elastic_connection(model)
