"""Sites found by trying: the expected ones on every architecture, and none that changes the function."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hf_lowbit.calibration.sites import Site, find_sites, fold_site, shared_inputs
from hf_lowbit.transforms import FoldError
from tests.matrix.models import MODELS


def _layers(block: nn.Module) -> list[str]:
    """What a plan would quantize: linear layers, Conv1D, fused experts; never routers."""
    kinds = (nn.Linear,)
    return [
        name
        for name, module in block.named_modules()
        if isinstance(module, kinds) or type(module).__name__ == "Conv1D" or hasattr(module, "gate_up_proj")
        if not isinstance(getattr(module, "gate_up_proj", None), nn.Linear)
    ]


def _captured(model: nn.Module, block: str, inputs: dict[str, Any]) -> tuple[nn.Module, tuple, dict]:
    """A block and its call in one forward, with random norms and biases so that nothing is trivially one or zero."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data += noise * (0.3 if parameter.dim() == 1 else 0.1)
    calls: list[Any] = []
    module = model.get_submodule(block)
    handle = module.register_forward_pre_hook(lambda m, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    with torch.no_grad():
        model(**inputs, use_cache=False)
    handle.remove()
    return module, *calls[0]


def _model_block(name: str, block: str) -> tuple[nn.Module, tuple, dict]:
    torch.manual_seed(0)
    return _captured(MODELS[name].build().eval(), block, MODELS[name].inputs(torch.float32))


def _run(block: nn.Module, args: tuple, kwargs: dict) -> torch.Tensor:
    with torch.no_grad():
        output = block(*args, **kwargs)
    return output[0] if isinstance(output, tuple) else output


def _scale(site: Site) -> torch.Tensor:
    return 4 ** torch.rand(site.channels, generator=torch.Generator().manual_seed(7)) / 2


def _check_all(block: nn.Module, args: tuple, kwargs: dict, sites: list[Site]) -> None:
    """Everything folded at once: the function, shapes and types stay."""
    before = _run(block, args, kwargs)
    kept = {name: (p.dtype, p.shape, p.clone()) for name, p in block.named_parameters()}
    for site in sites:
        fold_site(block, site, _scale(site))
    after = _run(block, args, kwargs)
    assert (after - before).norm() <= 1e-5 * before.norm()
    assert all((p.dtype, p.shape) == kept[name][:2] for name, p in block.named_parameters())
    for site in sites:
        for name in (site.previous, *site.consumers):
            own = block.get_submodule(name).named_parameters(recurse=False)
            assert any(not torch.equal(p, kept[f"{name}.{key}"][2]) for key, p in own), f"{name} did not change"


def _pairs(sites: list[Site]) -> dict[str, set[str]]:
    assert len({site.previous for site in sites}) == len(sites)
    return {site.previous: set(site.consumers) for site in sites}


def _attention(prefix: str, *names: str) -> set[str]:
    return {f"{prefix}.{name}" for name in names}


EXPECTED = {
    ("llama", "model.layers.1"): {
        "input_layernorm": _attention("self_attn", "q_proj", "k_proj", "v_proj"),
        "self_attn.v_proj": {"self_attn.o_proj"},
        "post_attention_layernorm": {"mlp.gate_proj", "mlp.up_proj"},
        "mlp.up_proj": {"mlp.down_proj"},
    },
    ("gpt2", "transformer.h.0"): {"ln_1": {"attn.c_attn"}, "ln_2": {"mlp.c_fc"}},
    ("qwen3_moe", "model.layers.1"): {
        "input_layernorm": _attention("self_attn", "q_proj", "k_proj", "v_proj"),
        "self_attn.v_proj": {"self_attn.o_proj"},
        "post_attention_layernorm": {"mlp.gate", "mlp.experts"},
    },
    ("whisper", "model.encoder.layers.0"): {
        "self_attn_layer_norm": _attention("self_attn", "q_proj", "k_proj", "v_proj"),
        "self_attn.v_proj": {"self_attn.out_proj"},
        "final_layer_norm": {"fc1"},
    },
    ("whisper", "model.decoder.layers.1"): {
        "self_attn_layer_norm": _attention("self_attn", "q_proj", "k_proj", "v_proj"),
        "self_attn.v_proj": {"self_attn.out_proj"},
        "encoder_attn_layer_norm": {"encoder_attn.q_proj"},
        "encoder_attn.v_proj": {"encoder_attn.out_proj"},
        "final_layer_norm": {"fc1"},
    },
    ("mamba", "backbone.layers.0"): {"norm": {"mixer.in_proj"}},
    ("mamba2", "backbone.layers.1"): {"norm": {"mixer.in_proj"}, "mixer.norm": {"mixer.out_proj"}},
}


@pytest.mark.parametrize(("name", "block"), EXPECTED, ids=lambda value: value)
def test_the_expected_sites_and_no_others(name, block):
    module, args, kwargs = _model_block(name, block)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    sites = find_sites(module, args, kwargs, _layers(module))
    assert _pairs(sites) == EXPECTED[name, block]
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items()), "a trial was left"
    _check_all(module, args, kwargs, sites)


def test_shared_value_heads_are_found_with_their_layout():
    """2 value heads of 16 channels for 4 query heads."""
    module, args, kwargs = _model_block("llama", "model.layers.0")
    site = next(s for s in find_sites(module, args, kwargs, _layers(module)) if s.previous == "self_attn.v_proj")
    assert site == Site("self_attn.v_proj", ("self_attn.o_proj",), 32, repeat=2, kind="linear", head_dim=16)


def test_only_sites_that_feed_the_given_layers():
    """A router is never in a plan, yet always among the consumers."""
    module, args, kwargs = _model_block("qwen3_moe", "model.layers.0")
    sites = find_sites(module, args, kwargs, ["mlp.experts"])
    assert _pairs(sites) == {"post_attention_layernorm": {"mlp.gate", "mlp.experts"}}
    assert find_sites(module, args, kwargs, ["mlp.gate.nothing"]) == []


def test_gemma_norms_are_offsets():
    from transformers import GemmaConfig, GemmaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = GemmaForCausalLM(GemmaConfig(vocab_size=256, num_key_value_heads=1, head_dim=16, **sizes)).eval()
    module, args, kwargs = _captured(model, "model.layers.0", {"input_ids": torch.arange(12)[None]})
    sites = find_sites(module, args, kwargs, _layers(module))
    assert _pairs(sites) == EXPECTED["llama", "model.layers.1"]
    assert [site.offset for site in sites] == [site.kind == "norm" for site in sites]
    _check_all(module, args, kwargs, sites)


def test_norms_before_a_residual_are_refused():
    """BERT's norms feed the next residual as well as the next layer."""
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    torch.manual_seed(0)
    module, args, kwargs = _captured(
        BertModel(BertConfig(vocab_size=256, **sizes)).eval(), "encoder.layer.0", {"input_ids": torch.arange(12)[None]}
    )
    sites = find_sites(module, args, kwargs, _layers(module))
    assert _pairs(sites) == {"attention.self.value": {"attention.output.dense"}}
    _check_all(module, args, kwargs, sites)


class Parallel(nn.Module):
    """Attention and MLP read one norm; the MLP has a ReLU, which positive scales pass through."""

    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.fc1, self.fc2, self.gain = nn.Linear(16, 24), nn.Linear(24, 16), gain
        self.value, self.dropout = nn.Linear(16, 16), nn.Dropout(0.5)

    def forward(self, x, *, mask=None):
        """A tuple, as many blocks return."""
        y = self.dropout(self.norm(x))
        q, k, _ = self.qkv(y).chunk(3, -1)
        mixed = F.scaled_dot_product_attention(q[:, None], k[:, None], self.value(y)[:, None], attn_mask=mask)[:, 0]
        return x + self.gain * (self.out(mixed) + self.fc2(F.relu(self.fc1(y)))), None


def _input(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


PARALLEL = {"norm": {"qkv", "value", "fc1"}, "value": {"out"}, "fc1": {"fc2"}}


def test_a_parallel_block_in_training_mode():
    torch.manual_seed(0)
    block, x = Parallel(), _input(2, 5, 16)
    sites = find_sites(block, (x,), {"mask": None}, _layers(block))
    assert _pairs(sites) == PARALLEL
    assert block.training and block.dropout.training
    _check_all(block.eval(), (x,), {}, sites)


@pytest.mark.parametrize(("gain", "expected"), [(1e-6, PARALLEL), (0.0, {})])
def test_small_branches_count_and_absent_ones_do_not(gain, expected):
    """A limit relative to the residual would let anything pass at 1e-6; at 0 nothing can be verified."""
    torch.manual_seed(0)
    block = Parallel(gain)
    assert _pairs(find_sites(block, (_input(2, 5, 16),), {}, _layers(block))) == expected


class SmallLeak(nn.Module):
    """A branch that hardly moves the residual, and reads the norm's output outside of the layer too."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(16), nn.Linear(16, 16)

    def forward(self, x):
        """The residual and a little."""
        y = self.norm(x)
        return x + 1e-7 * (self.fc(y) + y)


class SideOutput(Parallel):
    """Hands its norm's output on beside the main one."""

    def forward(self, x, *, mask=None):
        """Two streams."""
        return super().forward(x, mask=mask)[0], self.norm(x)


def test_unsafe_sites_are_refused():
    torch.manual_seed(0)
    x = _input(2, 5, 16)
    leak = SmallLeak()
    assert find_sites(leak, (x,), {}, ["fc"]) == []
    side = SideOutput()
    assert _pairs(find_sites(side, (x,), {}, _layers(side))) == {"value": {"out"}, "fc1": {"fc2"}}


class ListedExperts(nn.Module):
    """Experts as a list of modules, each on the tokens routed to it, beside one that is always called."""

    def __init__(self, idle: bool = False) -> None:
        super().__init__()
        self.norm, self.gate = nn.RMSNorm(16), nn.Linear(16, 4, bias=False)
        self.experts = nn.ModuleList(
            nn.ModuleDict({"gate": nn.Linear(16, 24), "up": nn.Linear(16, 24), "down": nn.Linear(24, 16)})
            for _ in range(4)
        )
        if idle:
            self.extra = nn.Linear(16, 16)

    def forward(self, x, use_extra: bool = False):
        """One expert per token."""
        y = self.norm(x).reshape(-1, 16)
        chosen, result = self.gate(y).argmax(-1), torch.zeros_like(y)
        for index, expert in enumerate(self.experts):
            token = torch.where(chosen == index)[0]
            if len(token):
                hidden = F.silu(expert["gate"](y[token])) * expert["up"](y[token])
                result[token] += expert["down"](hidden)
        if use_extra:
            result = result + self.extra(y)
        return x + result.reshape(x.shape)


@pytest.mark.parametrize("tokens", [1, 40])
def test_experts_without_tokens_are_folded_too(tokens):
    """Else the first token that reaches them later meets a divided norm and undivided columns."""
    torch.manual_seed(0)
    block, few, many = ListedExperts(), _input(1, tokens, 16), _input(3, 50, 16)
    routed = block.gate(block.norm(few)).argmax(-1).unique().tolist()
    assert len(routed) == (1 if tokens == 1 else 4)
    sites = find_sites(block, (few,), {}, _layers(block))
    expected = {f"experts.{i}.up": {f"experts.{i}.down"} for i in routed}
    expected["norm"] = {"gate"} | {f"experts.{i}.{name}" for i in range(4) for name in ("gate", "up")}
    assert _pairs(sites) == expected
    before = _run(block, (many,), {})
    for site in sites:
        fold_site(block, site, _scale(site))
    assert (_run(block, (many,), {}) - before).norm() <= 1e-5 * before.norm()


def test_idle_modules_without_siblings_veto():
    """What the idle layer reads in another call is unknown; where it is called, it is a consumer."""
    torch.manual_seed(0)
    block, x = ListedExperts(idle=True), _input(1, 40, 16)
    assert "norm" not in _pairs(find_sites(block, (x,), {}, _layers(block)))
    assert "extra" in _pairs(find_sites(block, (x,), {"use_extra": True}, _layers(block)))["norm"]


def test_layers_whose_weight_is_read_without_a_call_do_not_veto():
    """nn.MultiheadAttention never calls its out_proj; its own packed weight takes no scale."""
    torch.manual_seed(0)
    block, x = nn.TransformerEncoderLayer(16, 2, 24, norm_first=True, batch_first=True), _input(2, 5, 16)
    block.eval()
    sites = find_sites(block, (x,), {}, ["linear1", "linear2"])
    assert _pairs(sites) == {"norm2": {"linear1"}, "linear1": {"linear2"}}
    _check_all(block, (x,), {}, sites)


class Float32Only(Parallel):
    """Breaks in float64, as kernels do."""

    def forward(self, x, *, mask=None):
        """The same in float32."""
        if x.dtype != torch.float32:
            raise RuntimeError("float32 only")
        return super().forward(x, mask=mask)


def test_blocks_that_know_float32_only():
    """One token's residual is huge, as the first one's is in language models; the branch is small beside all."""
    torch.manual_seed(0)
    block, x = Float32Only(gain=0.03), _input(2, 5, 16)
    x[0, 0] *= 1e4
    assert _pairs(find_sites(block, (x,), {}, _layers(block))) == PARALLEL


def test_a_call_with_nan_is_refused():
    block = Parallel()
    with pytest.raises(ValueError, match="NaN or infinite"):
        find_sites(block, (torch.full((1, 2, 16), float("nan")),), {}, _layers(block))


def test_a_site_without_a_previous_module_cannot_be_folded():
    with pytest.raises(FoldError, match="at run time"):
        fold_site(Parallel(), Site(None, ("fc2",), 24), torch.ones(24))


def test_inputs_that_layers_share():
    module, args, kwargs = _model_block("whisper", "model.decoder.layers.0")
    attention = "encoder_attn"
    assert shared_inputs(module, args, kwargs, _layers(module)) == [
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.out_proj",),
        (f"{attention}.q_proj",),
        (f"{attention}.k_proj", f"{attention}.v_proj"),
        (f"{attention}.out_proj",),
        ("fc1",),
        ("fc2",),
    ]


def test_shared_inputs_see_through_views_and_keep_idle_layers():
    torch.manual_seed(0)
    module, args, kwargs = _model_block("qwen3_moe", "model.layers.0")
    groups = shared_inputs(module, args, kwargs, ["mlp.gate", *_layers(module)])
    assert {frozenset(group) for group in groups} == {
        frozenset({"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"}),
        frozenset({"self_attn.o_proj"}),
        frozenset({"mlp.gate", "mlp.experts"}),
    }
    block = ListedExperts(idle=True).train()
    groups = shared_inputs(block, (_input(1, 3, 16),), {}, _layers(block))
    assert sorted(name for group in groups for name in group) == sorted(_layers(block))
    assert ("extra",) in groups and block.training
