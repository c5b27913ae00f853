"""IR-QLoRA's base weights as a plugin: what reaches the rounding, what is stored, and what is left to nearest."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hf_lowbit
import hf_lowbit_ir_qlora.recipe
from hf_lowbit import ConfigError, IRQLoRAConfig, QLoRAConfig
from hf_lowbit.formats import PackedTensor, decode
from hf_lowbit.plan import packed_modules
from hf_lowbit.rounding import round_to_nearest
from hf_lowbit.rounding.entropy import fit_entropy
from hf_lowbit.rounding.store import round_with
from hf_lowbit_ir_qlora import METHOD
from tests.matrix.models import MODELS


def rounded(weight: Tensor, config: IRQLoRAConfig, name: str = "layer") -> PackedTensor:
    return METHOD.make_recipe(config).rounding(weight, config.layer_spec(name).weight)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02


def test_fields_reach_the_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []

    def spy(*args: Any, **options: Any) -> Any:
        calls.append(options)
        return fit_entropy(*args, **options)

    monkeypatch.setattr(hf_lowbit_ir_qlora.recipe, "fit_entropy", spy)
    rounded(normal(8, 64), IRQLoRAConfig())
    rounded(normal(8, 64), IRQLoRAConfig(tau_range=0.2, tau_steps=3))
    assert calls == [{"tau_range": 0.1, "steps": 100}, {"tau_range": 0.2, "steps": 3}]


def test_bits_per_weight() -> None:
    packed = rounded(normal(256, 2048), IRQLoRAConfig(tau_steps=1))
    stored = sum(tensor.numel() * tensor.element_size() for tensor in packed.tensors().values())
    assert 8 * stored / (256 * 2048) == pytest.approx(4 + 2 * (8 / 64 + 32 / (64 * 256)), abs=1e-9)


def test_an_error_close_to_that_of_nf4() -> None:
    """Entropy is what it maximises: the error may be a little larger."""
    weight = normal(128, 256)
    packed, config = rounded(weight, IRQLoRAConfig()), QLoRAConfig()
    error, plain = (
        ((decode(p) - weight).norm() / weight.norm()).item()
        for p in (packed, round_to_nearest(weight, config.layer_spec("layer").weight))
    )
    assert error == pytest.approx(plain, rel=0.03)


def test_experts_are_calibrated_one_by_one() -> None:
    stacked, config = normal(3, 32, 64), IRQLoRAConfig(scale_bits=None, tau_steps=5)
    packed, spec = rounded(stacked, config), config.layer_spec("layer").weight
    for index, matrix in enumerate(stacked):
        expected = round_with(lambda *args: fit_entropy(*args, steps=5), matrix, spec)
        assert torch.equal(decode(packed[index]), decode(expected))


def test_overrides_without_zero_points_are_rounded_to_nearest() -> None:
    overrides = {"q_proj": {"symmetric": True}, "k_proj": {"format": "int", "bits": 3}}
    config, weight = IRQLoRAConfig(overrides=overrides, tau_steps=5), normal(32, 128)
    nearest = round_to_nearest(weight, config.layer_spec("q_proj").weight)
    assert torch.equal(decode(rounded(weight, config, "q_proj")), decode(nearest))
    integers = rounded(weight, config, "k_proj")
    assert integers.spec.has_integer_zero_point
    assert not torch.equal(decode(integers), decode(round_to_nearest(weight, integers.spec)))


def test_a_model() -> None:
    torch.manual_seed(0)
    model = hf_lowbit.quantize(MODELS["llama"].build(), IRQLoRAConfig(tau_steps=3))
    specs = {module.layer_spec.weight for module in packed_modules(model).values()}
    assert {(s.format, s.bits, s.scale_bits, s.scale_group, s.symmetric) for s in specs} == {("nf", 4, 8, 256, False)}
    assert all(spec.has_coded_zero_point for spec in specs)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"symmetric": True}, "symmetric must be False"),
        ({"tau_range": -0.1}, "tau_range must be a number >= 0, not -0.1"),
        ({"tau_range": float("nan")}, "tau_range must be a number >= 0, not nan"),
        ({"tau_steps": 0.5}, "tau_steps must be an integer >= 0, not 0.5"),
        ({"tau_steps": True}, "tau_steps must be an integer >= 0, not True"),
        ({"bits": 8}, "format 'nf' allows 2 to 4 bits"),
    ],
)
def test_refusals(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"IRQLoRAConfig: {message}"):
        IRQLoRAConfig(**values)


def test_plain_scales_are_not_grouped() -> None:
    config = IRQLoRAConfig(scale_bits=None)
    assert config.scale_group == 16 and IRQLoRAConfig.from_dict(config.to_dict()) == config
