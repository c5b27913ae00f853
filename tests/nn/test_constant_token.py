"""A constant first token: its stored product, what other first tokens get, and that the codes never see it."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import Tensor, nn

from hf_lowbit.formats import ActivationSpec, SpecError, WeightSpec
from hf_lowbit.kernels import quantize_tokens, restore_tokens
from hf_lowbit.nn import KINDS, CorruptWeightError, LayerSpec, PackedLinear, connect_siblings
from hf_lowbit.plan import PlanError, PlannedLayer
from hf_lowbit.rounding import round_to_nearest

IN, OUT, TOKENS = 48, 24, 7
SPEC = LayerSpec(WeightSpec(bits=8), ActivationSpec(bits=8, static=True))


def packed(spec: LayerSpec = SPEC, bias: bool = False, limit: float = 5.0) -> tuple[nn.Linear, PackedLinear, Tensor]:
    """A float layer, the packed one with a constant token, and that token: 55 times as large as the others (MixDQ)."""
    torch.manual_seed(1)
    linear = nn.Linear(IN, OUT, bias=bias)
    token = torch.randn(IN)
    token[3] = 828 / 15 * 4
    module = PackedLinear.from_float(copy.deepcopy(linear), spec)
    module.allocate("weight", packed=False)
    module.set_constant_token(token, linear.weight.detach() @ token)
    if module.has_static_inputs:
        module.set_input_scale("weight", torch.tensor(limit / 127))
    module.set_packed("weight", round_to_nearest(linear.weight.detach(), spec.weight))
    return linear, module, token


def prompts(token: Tensor, batch: int = 3) -> Tensor:
    torch.manual_seed(2)
    x = torch.randn(batch, TOKENS, IN)
    x[:, 0] = token
    return x


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
def test_token_0_is_the_float_products_and_the_others_are_those_without_it(bias: bool) -> None:
    linear, module, token = packed(bias=bias)
    x = prompts(token)
    y, expected = module(x), linear(x)
    assert y.shape == expected.shape
    torch.testing.assert_close(y[:, 0], expected[:, 0], rtol=1e-6, atol=1e-5)
    bare = PackedLinear.from_float(linear, SPEC)  # the same codes and scale, no constant
    bare.allocate("weight", packed=False)
    bare.set_input_scale("weight", torch.tensor(5.0 / 127))
    bare.set_packed("weight", module.packed())
    assert torch.equal(y[:, 1:], bare(x[:, 1:]))


@torch.no_grad()
def test_leaving_it_out_of_the_range_gains_what_the_range_loses() -> None:
    """The specification's test 3: 55 times the range are 35 dB at 8 bits."""
    _, _, token = packed()
    x = prompts(token, 16)
    spec = ActivationSpec(bits=8, static=True)

    def sqnr(limit: Tensor) -> float:
        rest = x[:, 1:].reshape(-1, IN)
        back = restore_tokens(*quantize_tokens(rest, spec, (limit / 127).reshape(1)))
        return (10 * torch.log10(rest.square().sum() / (rest - back).square().sum())).item()

    gain = sqnr(x[:, 1:].abs().max()) - sqnr(x.abs().max())
    assert gain == pytest.approx(20 * torch.log10(x.abs().max() / x[:, 1:].abs().max()).item(), abs=6) and gain > 25


@torch.no_grad()
@pytest.mark.parametrize("first", ["zero", "weighted", "learned"])
def test_another_first_token_is_multiplied_in_full_precision(first: str) -> None:
    linear, module, token = packed()
    x = prompts(token)
    x[1, 0] = {"zero": torch.zeros(IN), "weighted": 1.3 * token, "learned": 40 * torch.randn(IN)}[first]
    y = module(x)
    torch.testing.assert_close(y[1, 0], module.dequantized() @ x[1, 0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(y[[0, 2], 0], linear(x)[[0, 2], 0], rtol=1e-6, atol=1e-5)


@torch.no_grad()
def test_the_type_of_the_pipeline_does_not_matter() -> None:
    linear, module, token = packed()
    x = prompts(token).to(torch.float16)  # of a text encoder in half precision
    y = module.half()(x)
    assert y.dtype == torch.float16
    exact = linear.weight @ token
    torch.testing.assert_close(y[0, 0].float(), exact, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_sequences_of_one_token_and_without_a_batch() -> None:
    linear, module, token = packed()
    torch.testing.assert_close(module(prompts(token)[:, :1]), linear(prompts(token)[:, :1]), rtol=1e-6, atol=1e-5)
    assert torch.equal(module(prompts(token)[0]), module(prompts(token))[0])


def test_gradients_and_compilation_take_the_full_product() -> None:
    _, module, token = packed()
    x = prompts(token).requires_grad_()
    module(x).sum().backward()
    assert x.grad is not None and x.grad[:, 0].abs().sum() > 0
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(prompts(token)), module(prompts(token)))


@torch.no_grad()
def test_it_is_stored_and_comes_back() -> None:
    _, module, token = packed()
    spec = LayerSpec.from_dict(json.loads(json.dumps(module.layer_spec.to_dict())))
    assert spec == module.layer_spec and spec.constant_token
    again = PackedLinear(IN, OUT, spec)
    again.weight, again.bias = nn.Parameter(torch.empty(OUT, IN)), None
    again.allocate("weight", packed=True)
    again.load_state_dict(module.state_dict())
    assert torch.equal(again(prompts(token)), module(prompts(token)))
    stored = module.state_dict()
    assert {stored[f"weight_constant_{part}"].dtype for part in ("input", "output")} == {torch.int32}


def test_it_computes_alone() -> None:
    parent = nn.Module()
    for name in ("to_q", "to_k", "to_v"):
        module = packed()[1]
        parent.add_module(name, module)
    assert connect_siblings(parent) == 0


def test_what_is_refused() -> None:
    linear, module, token = packed()
    with pytest.raises(ValueError, match=r"a constant token is \[48\] and its product \[24\]"):
        module.set_constant_token(token[1:], linear.weight.detach() @ token)
    with pytest.raises(ValueError, match="NaN or infinite"):
        module.set_constant_token(token * float("nan"), linear.weight.detach() @ token)
    with pytest.raises(SpecError, match="constant_token must be True or False"):
        LayerSpec(WeightSpec(), constant_token=1)  # type: ignore[arg-type]
    for kind in set(KINDS) - {"linear", "transformers_conv1d"}:
        with pytest.raises(PlanError, match="cannot have a constant token"):
            PlannedLayer(kind, LayerSpec(WeightSpec(), constant_token=True))
    module.weight_constant_output.data[0] = torch.tensor(float("inf")).view(torch.int32)
    with pytest.raises(CorruptWeightError, match="weight_constant_output holds NaN"):
        module.check()
