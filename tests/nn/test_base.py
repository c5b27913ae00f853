"""What every packed module promises, whatever it packs."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts
from transformers.pytorch_utils import Conv1D

from hf_lowbit.formats import ActivationSpec, WeightSpec
from hf_lowbit.nn import CorruptWeightError, LayerSpec, PackedEmbedding, PackedModule, kind_of, refusal_of
from hf_lowbit.nn.kinds import KINDS, register_kind
from hf_lowbit.plan import Plan, PlanError, PlannedLayer, install

Pack = Callable[[nn.Module, LayerSpec], PackedModule]


def experts() -> nn.Module:
    config = Qwen3MoeConfig(
        hidden_size=32, moe_intermediate_size=16, num_experts=3, num_experts_per_tok=2, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, vocab_size=16,
    )  # fmt: skip
    config._experts_implementation = "eager"
    module = Qwen3MoeExperts(config)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)
    return module


MODULES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(32, 24),
    "linear without bias": lambda: nn.Linear(32, 24, bias=False),
    "transformers_conv1d": lambda: Conv1D(24, 32),
    "conv1d": lambda: nn.Conv1d(16, 12, 4, padding=1),
    "conv2d": lambda: nn.Conv2d(8, 12, (2, 4), groups=2),
    "embedding": lambda: nn.Embedding(20, 32, padding_idx=3),
    "experts": experts,
}
SPECS = {
    "int4": LayerSpec(WeightSpec(group_size=16)),
    "zero points": LayerSpec(WeightSpec("nf", 4, 16, symmetric=False, scale_dtype="float16")),
    "float32 scales": LayerSpec(WeightSpec("int", 3, scale_dtype="float32", symmetric=False)),
    "fitted": LayerSpec(WeightSpec("codebook", 3)),
    "branch": LayerSpec(WeightSpec("int", 2), low_rank=4),
    "one scale": LayerSpec(WeightSpec("ternary", 2, "tensor", packing="base3")),
}
every_module = pytest.mark.parametrize("kind", MODULES)
# a table fitted to fused experts is refused: tests/rounding and tests/plan
every_packed_module = pytest.mark.parametrize(
    ("kind", "spec"), [(k, s) for k in MODULES for s in SPECS if (k, s) != ("experts", "fitted")]
)


def example(kind: str) -> tuple[Tensor, ...]:
    torch.manual_seed(1)
    return {
        "linear": lambda: (torch.randn(2, 5, 32),),
        "transformers_conv1d": lambda: (torch.randn(2, 5, 32),),
        "conv1d": lambda: (torch.randn(2, 16, 9),),
        "conv2d": lambda: (torch.randn(2, 8, 6, 7),),
        "embedding": lambda: (torch.tensor([[0, 3], [19, 3]]),),
        "experts": lambda: (torch.randn(6, 32), torch.tensor([[0, 1], [2, 1], [0, 2]] * 2), torch.rand(6, 2)),
    }[kind.split(" ")[0]]()


def make(kind: str, spec: str, pack: Pack) -> PackedModule:
    torch.manual_seed(0)
    return pack(MODULES[kind](), SPECS[spec])


def packed_state(module: PackedModule) -> dict[str, Tensor]:
    return {
        key: getattr(module, key).detach().clone()
        for name in module.packed_parameters
        for key in module.companion_shapes(name)
    }


def assert_same_packed(module: PackedModule, expected: dict[str, Tensor]) -> None:
    for key, tensor in packed_state(module).items():
        assert tensor.dtype == expected[key].dtype and torch.equal(tensor, expected[key]), key


@every_packed_module
def test_forward_is_that_of_the_float_module_with_dequantized_weights(kind: str, spec: str, pack: Pack) -> None:
    module, inputs = make(kind, spec, pack), example(kind)
    expected = module.to_float(torch.float32)(*inputs)
    assert torch.allclose(module(*inputs), expected, atol=1e-4, rtol=1e-4)


@every_packed_module
def test_to_float_gives_the_original_class_with_ordinary_parameters(kind: str, spec: str, pack: Pack) -> None:
    module, original = make(kind, spec, pack), MODULES[kind]()
    restored = module.to_float(torch.bfloat16)
    assert type(restored) is type(original)
    assert list(restored.state_dict()) == list(original.state_dict())
    assert {n: p.shape for n, p in restored.named_parameters()} == {n: p.shape for n, p in original.named_parameters()}
    for name in module.packed_parameters:
        assert getattr(restored, name).dtype == torch.bfloat16 and getattr(restored, name).requires_grad


@every_packed_module
@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.bfloat16, nn.Module.double, lambda m: m.to(torch.float16)])
def test_casts_do_not_touch_packed_parameters(
    kind: str, spec: str, cast: Callable[[nn.Module], nn.Module], pack: Pack
) -> None:
    module = make(kind, spec, pack)
    before = packed_state(module)
    cast(module)
    assert_same_packed(module, before)
    module.float()
    assert_same_packed(module, before)


@every_module
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_outputs_follow_the_type_of_a_cast_module(kind: str, dtype: torch.dtype, pack: Pack) -> None:
    module = make(kind, "branch", pack)
    inputs = tuple(x.to(dtype) if x.is_floating_point() else x for x in example(kind))
    exact = make(kind, "branch", pack)(*example(kind))
    y = module.to(dtype)(*inputs)
    assert y.dtype == dtype
    assert torch.allclose(y.float(), exact, atol=0.1, rtol=0.1)


@every_packed_module
def test_copies_keep_everything(kind: str, spec: str, pack: Pack) -> None:
    module, inputs = make(kind, spec, pack), example(kind)
    before, expected = packed_state(module), module(*inputs)
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert_same_packed(copied, before)
        assert copied.layer_spec == module.layer_spec
        assert torch.equal(copied(*inputs), expected)
        assert torch.equal(copied.to_float(torch.float32)(*inputs), module.to_float(torch.float32)(*inputs))


@every_packed_module
def test_state_dict_is_the_disk_layout(kind: str, spec: str, pack: Pack) -> None:
    module, original = make(kind, spec, pack), MODULES[kind]()
    state = module.state_dict()
    companions = {
        key: shape for name in module.packed_parameters for key, shape in module.companion_shapes(name).items()
    }
    assert set(state) == set(original.state_dict()) | set(companions)
    for key, (shape, dtype) in companions.items():
        assert (tuple(state[key].shape), state[key].dtype) == (shape, dtype)
        assert dtype in (torch.int16, torch.int32) and not getattr(module, key).requires_grad
    for name in module.packed_parameters:
        assert state[name].dtype == torch.int32


@every_packed_module
def test_state_dict_loads_into_an_allocated_module(kind: str, spec: str, pack: Pack) -> None:
    module, inputs = make(kind, spec, pack), example(kind)
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    waiting = KINDS[kind.split(" ")[0]].from_float(MODULES[kind](), SPECS[spec])
    for name in waiting.packed_parameters:
        waiting.allocate(name, packed=True)
    waiting.load_state_dict(torch.load(buffer, weights_only=True))
    waiting.check()
    assert torch.equal(waiting(*inputs), module(*inputs))


@every_module
def test_the_branch_brings_the_weight_closer(kind: str, pack: Pack) -> None:
    module = make(kind, "branch", pack)
    torch.manual_seed(0)
    original = MODULES[kind]()
    for name in module.packed_parameters:
        exact = getattr(original, name)
        with_branch = (exact - module.dequantized(name)).norm()
        assert with_branch < 0.9 * (exact - module.dequantized(name, branch=False)).norm()


@every_packed_module
def test_check_accepts_what_quantization_made(kind: str, spec: str, pack: Pack) -> None:
    make(kind, spec, pack).check()


@every_packed_module
def test_check_finds_wrong_shapes_and_types_of_every_tensor(kind: str, spec: str, pack: Pack) -> None:
    for name in KINDS[kind.split(" ")[0]].packed_parameters:
        for key in make(kind, spec, pack).companion_shapes(name):
            for damage in (lambda t: t[..., :0], lambda t: t.long(), lambda t: torch.cat([t, t])):
                module = make(kind, spec, pack)
                setattr(module, key, nn.Parameter(damage(getattr(module, key).data), requires_grad=False))
                with pytest.raises(CorruptWeightError, match=f"^{key} is"):
                    module.check()


@every_packed_module
def test_check_finds_values_that_cannot_be(kind: str, spec: str, pack: Pack) -> None:
    layer = SPECS[spec]
    patterns = {"bfloat16": 0x7FC0, "float16": 0x7C00, "float32": 0x7FC00000}  # NaN, infinity, NaN
    for name in KINDS[kind.split(" ")[0]].packed_parameters:
        for suffix in ("_scale", "_zero_point", "_table", "_low_rank_a", "_low_rank_b"):
            module = make(kind, spec, pack)
            stored = getattr(module, f"{name}{suffix}", None)
            if stored is None or (suffix == "_zero_point" and layer.weight.has_integer_zero_point):
                continue  # any integer zero point is a valid one
            dtype = "float32" if suffix == "_table" else "bfloat16" if "rank" in suffix else layer.weight.scale_dtype
            stored.data.view(-1)[-1] = patterns[dtype]
            with pytest.raises(CorruptWeightError, match=f"{name}{suffix} holds NaN or infinite"):
                module.check()


def test_set_packed_refuses_another_layers_tensors(pack: Pack) -> None:
    module = pack(nn.Linear(32, 24), LayerSpec(WeightSpec()))
    with pytest.raises(ValueError, match=r"weight is \(16, 4\)"):
        module.set_packed("weight", pack(nn.Linear(32, 16), LayerSpec(WeightSpec())).packed())


@settings(deadline=None, derandomize=True, max_examples=300)
@given(
    bits=st.integers(1, 8),
    columns=st.integers(2, 70),
    rows=st.integers(1, 9),
    group_size=st.sampled_from([None, "tensor"]),
    symmetric=st.booleans(),
)
def test_no_packed_shape_equals_the_float_one(
    bits: int, columns: int, rows: int, group_size: Any, symmetric: bool
) -> None:
    """A loader without hf_lowbit must notice: same name, same shape would load codes as weights."""
    stored = WeightSpec("int", bits, group_size, symmetric).companions((rows,), columns)
    assert stored[""][0] != (rows, columns)


@pytest.mark.parametrize("bits", range(1, 9))
def test_no_packed_shape_equals_the_float_one_at_any_width(bits: int) -> None:
    for columns in range(2, 71):
        assert WeightSpec("int", bits).companions((4,), columns)[""][0] != (4, columns)
    assert WeightSpec("ternary", 2, packing="base3").companions((4,), 2)[""][0] != (4, 2)


@every_module
def test_other_kinds_refuse_the_module(kind: str) -> None:
    module = MODULES[kind]()
    for other, cls in KINDS.items():
        if other != kind.split(" ")[0]:
            with pytest.raises(TypeError):
                cls.from_float(module, SPECS["int4"])


@every_module
def test_extra_repr_names_shape_and_format(kind: str, pack: Pack) -> None:
    assert "int 4 bits, group=16" in make(kind, "int4", pack).extra_repr()


@pytest.mark.parametrize(
    ("module", "kind"),
    [(nn.Linear(2, 2), "linear"), (Conv1D(2, 2), "transformers_conv1d"), (nn.Conv1d(2, 2, 1), "conv1d"),
     (nn.Conv2d(2, 2, 1), "conv2d"), (nn.Embedding(2, 2), "embedding"), (nn.LayerNorm(2), None), (nn.ReLU(), None)],
)  # fmt: skip
def test_kind_of(module: nn.Module, kind: str | None) -> None:
    assert kind_of(module) == kind
    assert refusal_of(module) is None


class OwnLinear(nn.Linear):
    """A subclass: who knows what it does with its weight."""


class OwnMatrix(nn.Module):
    """A module with a matrix of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Parameter(torch.zeros(4, 4))


@pytest.mark.parametrize(
    ("module", "reason"),
    [(OwnLinear(2, 2), "subclass of Linear"), (nn.ConvTranspose1d(2, 2, 1), "ConvTranspose1d is not supported"),
     (nn.Conv3d(2, 2, 1), "Conv3d is not supported"), (OwnMatrix(), "computes with its projection itself"),
     (nn.GRU(4, 4), "computes with its weight_ih_l0")],
)  # fmt: skip
def test_weights_that_cannot_be_packed_have_a_reason(module: nn.Module, reason: str) -> None:
    assert kind_of(module) is None
    assert reason in str(refusal_of(module))


def test_packed_modules_need_no_reason(pack: Pack) -> None:
    assert refusal_of(pack(nn.Linear(32, 8), SPECS["int4"])) is None


def test_experts_of_another_layout_have_a_reason() -> None:
    module = experts()
    module.is_transposed = True  # type: ignore[assignment]
    assert kind_of(module) is None
    assert "is_transposed=True are not supported" in str(refusal_of(module))


def test_a_kind_belongs_to_one_class() -> None:
    class Other(PackedEmbedding):
        kind = "linear"

    with pytest.raises(ValueError, match="'linear' is already registered by PackedLinear"):
        register_kind(Other)
    register_kind(KINDS["linear"])  # twice is harmless


def test_install_names_a_layer_that_the_plan_takes_for_another() -> None:
    for kind, module in (("conv2d", nn.Linear(4, 4)), ("linear", nn.LayerNorm(4)), ("linear", nn.ReLU())):
        with pytest.raises(PlanError, match="inner"):
            install(nn.ModuleDict({"inner": module}), Plan({"inner": PlannedLayer(kind, SPECS["int4"])}), packed=True)


def test_layer_spec_is_strict_and_survives_a_dict() -> None:
    spec = LayerSpec(WeightSpec("nf", 3, 16), ActivationSpec("int", 6), 4)
    assert LayerSpec.from_dict(spec.to_dict()) == spec
    for values in ({}, {"weight": {}, "other": 1}, {"weight": {"bits": 4}, "low_rank": -1}, {"weight": {"bites": 4}}):
        with pytest.raises(ValueError):
            LayerSpec.from_dict(values)
