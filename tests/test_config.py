"""LowbitConfig: strict, plain data, and never a holder of the user's data on disk."""

from __future__ import annotations

import copy
import json
import pickle
from typing import Any

import pytest

from hf_lowbit import ConfigError, LowRankConfig, RTNConfig
from hf_lowbit.config import FORMAT_VERSION, MethodName
from hf_lowbit.formats import ActivationSpec, WeightSpec

PLAN = [{"kind": "linear", "weight": {"format": "int", "bits": 4, "group_size": 64}, "modules": ["layers.*.q"]}]
CONFIGS: list[dict[str, Any]] = [
    {},
    {"bits": 3, "group_size": None, "symmetric": False},
    {"format": "nf", "group_size": "tensor", "scale_dtype": "float16"},
    {"format": "power", "exponent": 0.5},
    {"format": "ternary", "packing": "base3"},
    {"format": "codebook", "codebook": (-1, 0, 0.5, 1)},
    {"format": "codebook", "bits": 3},
    {"activation_bits": 6},
    {"activation_format": "fp_e4m3fn", "format": "float8_e4m3fn"},
    {"quantize_embeddings": True, "quantize_lm_head": True, "strict_groups": True, "seed": 7},
    {"modules_to_not_convert": ("lm_head", r".*\.q"), "overrides": {"layers.0": {"bits": 8, "group_size": None}}},
    {"low_rank": LowRankConfig(8, keep="adapter")},
    {"low_rank": LowRankConfig(8, metric="full", factor_bits=8, budget_bits=4.5), "overrides": {"q": {"low_rank": 2}}},
    {"plan": PLAN, "provenance": {"source": "org/model"}},
]
every_config = pytest.mark.parametrize("values", CONFIGS, ids=lambda v: "-".join(v) or "default")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bit": 4}, "RTNConfig has no field bit; did you mean 'bits'?"),
        ({"groupsize": 4}, "did you mean 'group_size'?"),
        ({"xyzzy": 4}, "known fields: format, bits"),
        ({"bits": "4"}, "bits must be an integer, not '4'"),
        ({"bits": 9}, "1 to 8 bits"),
        ({"bits": 8, "format": "nf"}, "2 to 4 bits"),
        ({"format": "int4"}, "unknown number format 'int4'"),
        ({"format": 4}, "by its name"),
        ({"group_size": -1}, "use None for one scale per row"),
        ({"group_size": 0}, "group_size must be"),
        ({"symmetric": "no"}, "symmetric must be True or False"),
        ({"scale_dtype": "float8"}, "scale_dtype must be one of"),
        ({"packing": "base3"}, "base3"),
        ({"exponent": 0.5}, "exponent belongs to format 'power'"),
        ({"format": "power"}, "needs an exponent"),
        ({"format": "power", "exponent": 5}, "exponent <= 4"),
        ({"codebook": [0, 1]}, "codebook belongs to format 'codebook'"),
        ({"format": "codebook", "codebook": [0, 1, 2]}, "4 values, not 3"),
        ({"format": "codebook", "codebook": "01"}, "must be a list of numbers"),
        ({"activation_bits": 5}, "4, 6 or 8 bits"),
        ({"activation_bits": "8"}, "4, 6 or 8 bits"),
        ({"activation_format": "nf"}, "activations are quantized to"),
        ({"activation_format": ["int"]}, "activations are quantized to"),
        ({"activation_format": "float8_e4m3fn", "activation_bits": 4}, "activations are quantized to"),
        ({"quantize_embeddings": 1}, "quantize_embeddings must be True or False"),
        ({"quantize_lm_head": "yes"}, "quantize_lm_head must be True or False"),
        ({"strict_groups": None}, "strict_groups must be True or False"),
        ({"modules_to_not_convert": "lm_head"}, "must be a list"),
        ({"modules_to_not_convert": [3]}, "a module name or regular expression is expected"),
        ({"modules_to_not_convert": ["["]}, "not a valid regular expression"),
        ({"overrides": ["lm_head"]}, "overrides must be"),
        ({"overrides": {"lm_head": 8}}, "overrides must be"),
        ({"overrides": {"[": {}}}, "not a valid regular expression"),
        ({"overrides": {"lm_head": {"bit": 8}}}, "cannot set bit; did you mean 'bits'"),
        ({"overrides": {"lm_head": {"low_rank": 8}}}, "and the config none: give it low_rank=LowRankConfig"),
        ({"overrides": {"lm_head": {"low_rank": -1}}, "low_rank": {"rank": 4}}, "an integer of at least 0, not -1"),
        ({"overrides": {"lm_head": {"bits": 12}}}, "1 to 8 bits"),
        ({"overrides": {"lm_head": {"format": None}}}, "by its name"),
        ({"low_rank": 8}, "low_rank must be a LowRankConfig"),
        ({"low_rank": {"rnk": 8}}, "no field low_rank.rnk; did you mean 'rank'?"),
        ({"low_rank": {"rank": 0}}, "low_rank.rank must be a positive integer"),
        ({"low_rank": {"metric": "fulll"}}, "low_rank.metric='fulll' is not supported; did you mean 'full'?"),
        ({"low_rank": {"metric": "rxx"}}, "supported: identity, mean_abs, diag, full"),
        ({"low_rank": {"keep": "branches"}}, "did you mean 'branch'?"),
        ({"low_rank": {"iterations": 0}}, "low_rank.iterations must be a positive integer"),
        ({"low_rank": {"factor_bits": 3}}, "low_rank.factor_bits must be one of 16, 8, 4, not 3"),
        ({"low_rank": {"factor_bits": 8, "keep": "adapter"}}, 'factor_bits=8 needs keep="branch"'),
        ({"low_rank": {"budget_bits": 0}}, "low_rank.budget_bits must be a number of bits between 0 and 16"),
        ({"low_rank": {"keep": "fused", "metric": "full"}}, "metric='full' has no meaning with keep=\"fused\""),
        ({"low_rank": {"keep": "fused"}, "format": "codebook", "bits": 3}, "give codebook=[...]"),
        ({"backend": "cuda"}, "backend 'cuda' does not exist; there are: reference, cpu"),
        ({"num_samples": 0}, "num_samples must be a positive integer"),
        ({"sequence_length": 1.5}, "sequence_length must be a positive integer"),
        ({"seed": "now"}, "seed must be an integer"),
        ({"provenance": "me"}, "provenance must be a dictionary"),
        ({"plan": {}}, "a plan is a list"),
        ({"plan": [{"kind": "os.system", "weight": {}, "modules": []}]}, "unknown kind"),
    ],
    ids=str,
)
def test_unknown_and_out_of_range_fields_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        RTNConfig(**values)
    assert message in str(refusal.value)


@every_config
def test_dict_round_trip_through_json(values: dict[str, Any]) -> None:
    config = RTNConfig(**values)
    restored = RTNConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert restored == config
    assert restored.same_request(config)


@every_config
def test_copies_are_equal(values: dict[str, Any]) -> None:
    config = RTNConfig(**values)
    assert copy.deepcopy(config) == config
    assert pickle.loads(pickle.dumps(config)) == config


def test_stored_form() -> None:
    assert RTNConfig(seed=3).to_dict() == {
        "quant_method": "lowbit_rtn",
        "format_version": FORMAT_VERSION,
        "format": "int",
        "bits": 4,
        "group_size": 128,
        "seed": 3,
    }
    assert RTNConfig().to_diff_dict() == dict(RTNConfig()) == RTNConfig().to_dict()


def test_json_string_is_what_transformers_writes() -> None:
    assert json.loads(RTNConfig(bits=3).to_json_string(use_diff=False))["bits"] == 3


def test_the_dataset_is_never_stored() -> None:
    config = RTNConfig(dataset=["the secret text"])
    assert "dataset" not in config.to_dict()
    assert "secret" not in config.to_json_string() + repr(config)


def test_copies_share_the_dataset_and_not_the_plan() -> None:
    data = [object()]
    config = RTNConfig(dataset=data, plan=PLAN, provenance={"source": {"name": "x"}})
    copied = copy.deepcopy(config)
    assert copied.dataset is data
    assert copied.plan == config.plan and copied.plan is not config.plan
    copied.provenance["source"]["name"] = "y"
    assert config.provenance == {"source": {"name": "x"}}


def test_to_dict_is_a_copy() -> None:
    config = RTNConfig(plan=copy.deepcopy(PLAN))
    config.to_dict()["plan"].clear()
    assert config.plan == PLAN


def test_copy_with_data_starts_a_new_run() -> None:
    config = RTNConfig(dataset="old", plan=PLAN)
    run = config.copy_with_data("new")
    assert (run.dataset, run.plan) == ("new", None)
    assert config.copy_with_data(None).dataset == "old"


def test_same_request_ignores_plan_and_provenance_only() -> None:
    config = RTNConfig(bits=3)
    assert config.same_request(RTNConfig(bits=3, plan=PLAN, provenance={"a": 1}))
    assert not config.same_request(RTNConfig(bits=3, seed=1))


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({"quant_method": "lowbit_gptq"}, "a config of 'lowbit_gptq', not of 'lowbit_rtn'"),
        ({"format_version": FORMAT_VERSION + 1}, "upgrade hf_lowbit"),
        ({"format_version": "1"}, "format_version='1'"),
        ({"format_version": 0}, "format_version=0"),
        ({"bites": 4}, "did you mean 'bits'"),
        ({"bits": 44}, "1 to 8"),
    ],
)
def test_from_dict_is_strict(stored: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RTNConfig.from_dict({"quant_method": "lowbit_rtn", **stored})


def test_from_dict_takes_what_transformers_passes() -> None:
    config, unused = RTNConfig.from_dict(
        {"quant_method": MethodName("lowbit_rtn"), "bits": 3}, return_unused_kwargs=True, seed=5
    )
    assert (config.bits, config.seed, unused) == (3, 5, {})


def test_quant_method_is_a_string_with_the_value_that_diffusers_reads() -> None:
    assert RTNConfig().quant_method == "lowbit_rtn" == RTNConfig.quant_method.value
    assert type(RTNConfig.quant_method.value) is str
    assert json.dumps(RTNConfig.quant_method) == '"lowbit_rtn"'


def test_rtn_defaults() -> None:
    config = RTNConfig()
    assert (config.format, config.bits, config.group_size, config.symmetric) == ("int", 4, 128, True)
    assert not config.quantize_embeddings and not config.quantize_lm_head and config.activation_bits is None
    assert config.layer_spec("layer").weight == WeightSpec("int", 4, 128)


@pytest.mark.parametrize(("name", "bits"), [("int", 4), ("ternary", 2), ("float8_e5m2", 8), ("fp_e3m2", 6)])
def test_bits_follow_the_format_when_none_are_given(name: str, bits: int) -> None:
    assert RTNConfig(format=name).bits == bits


def test_layer_spec_applies_the_first_override_that_matches() -> None:
    config = RTNConfig(
        format="power", exponent=0.5, activation_bits=8, low_rank={"rank": 4},
        overrides={"layers.0": {"format": "nf"}, r".*": {"activation_bits": None, "bits": 3}},
    )  # fmt: skip
    first, other = config.layer_spec("model.layers.0.q"), config.layer_spec("model.layers.1.q")
    assert first.weight == WeightSpec("nf", 4, 128)  # another format takes no exponent along
    assert other.weight == WeightSpec("power", 3, 128, exponent=0.5)
    assert (first.activation, other.activation) == (ActivationSpec("int", 8), None)
    assert first.low_rank == other.low_rank == 4


def test_an_adapter_is_no_branch_of_the_layer() -> None:
    assert RTNConfig(low_rank=LowRankConfig(8, keep="adapter")).layer_spec("x").low_rank == 0


def test_activation_formats() -> None:
    assert RTNConfig(activation_bits=4).layer_spec("x").activation == ActivationSpec("int", 4)
    assert RTNConfig(activation_format="int").layer_spec("x").activation == ActivationSpec("int", 8)
    assert RTNConfig(activation_format="fp_e4m3fn").layer_spec("x").activation == ActivationSpec("float8_e4m3fn", 8)


def test_asymmetric_activations() -> None:
    overrides = {
        "down_proj": {"activation_bits": 8},
        "fc": {"activation_format": "float8_e4m3fn", "activation_bits": 8},
        "out": {"activation_bits": 6},
        "in": {"activation_bits": None},
        "q": {"activation_symmetric": True},
    }
    config = RTNConfig(activation_bits=4, activation_symmetric=False, overrides=overrides)
    specs = {name: config.layer_spec(name).activation for name in ("x", *overrides)}
    assert specs == {
        "x": ActivationSpec("int", 4, False),
        "down_proj": ActivationSpec("int", 8, False),
        "fc": ActivationSpec("float8_e4m3fn", 8),
        "out": ActivationSpec("int", 6, False),
        "in": None,
        "q": ActivationSpec("int", 4),
    }
    assert RTNConfig.from_dict(config.to_dict()).layer_spec("x") == config.layer_spec("x")
    with pytest.raises(ConfigError, match="activation_symmetric=False needs activation_bits"):
        RTNConfig(activation_symmetric=False)
    with pytest.raises(ConfigError, match="a float has no zero point"):
        RTNConfig(activation_format="float8_e4m3fn", activation_symmetric=False)
    with pytest.raises(ConfigError, match="activation_symmetric must be True or False"):
        RTNConfig(activation_bits=4, activation_symmetric=None)


def test_inputs_per_timestep() -> None:
    overrides = {"proj_out": {"activation_timesteps": False}, "conv_in": {"activation_static": False}}
    config = RTNConfig(activation_bits=8, activation_static=True, activation_timesteps=True, overrides=overrides)
    specs = [config.layer_spec(name).activation for name in ("x", *overrides)]
    assert specs == [
        ActivationSpec("int", 8, static=True, timesteps=()),
        ActivationSpec("int", 8, static=True),
        ActivationSpec("int", 8),
    ]
    assert RTNConfig.from_dict(json.loads(json.dumps(config.to_dict()))).layer_spec("x") == config.layer_spec("x")
    with pytest.raises(ConfigError, match="activation_timesteps=True needs activation_bits or activation_format, and"):
        RTNConfig(activation_timesteps=True)
    with pytest.raises(ConfigError, match="scales of timesteps are static ones"):
        RTNConfig(activation_bits=8, activation_timesteps=True)
    with pytest.raises(ConfigError, match="activation_timesteps must be True or False, not 25"):
        RTNConfig(activation_bits=8, activation_static=True, activation_timesteps=25)
    with pytest.raises(ConfigError, match="a shift is of static activations of a floating-point format"):
        RTNConfig(activation_bits=8, activation_static=True, activation_shift=True)


def test_repr_shows_what_differs() -> None:
    assert repr(RTNConfig(seed=2, plan=PLAN)) == "RTNConfig(format='int', bits=4, group_size=128, seed=2)"


def test_single_layers_have_ranks_of_their_own() -> None:
    overrides = {"q_proj": {"low_rank": 2}, "lm_head": {"low_rank": 0, "bits": 8}, "up_proj": {"bits": 3}}
    config = RTNConfig(low_rank=LowRankConfig(8, factor_bits=4), overrides=overrides)
    expected = {"a.q_proj": (2, 4), "lm_head": (0, 16), "a.up_proj": (8, 4), "a.k_proj": (8, 4)}
    specs = {name: config.layer_spec(name) for name in expected}
    assert {name: (spec.low_rank, spec.factor_bits) for name, spec in specs.items()} == expected
    assert [config.adapter_rank(name) for name in expected] == [0] * 4  # they are branches
    adapter = RTNConfig(low_rank=LowRankConfig(8, keep="adapter"), overrides=overrides)
    assert [adapter.adapter_rank(name) for name in expected] == [2, 0, 8, 8]
    assert all(adapter.layer_spec(name).low_rank == 0 for name in expected)
