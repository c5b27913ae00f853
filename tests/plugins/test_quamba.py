"""Quamba: the numbered tests of its method page, and what becomes of a model."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

import hf_lowbit
from hf_lowbit.calibration.block import Block
from hf_lowbit.calibration.checkpoint import Checkpoint
from hf_lowbit.calibration.mixers import fold_gains, rotate_outputs
from hf_lowbit.calibration.percentile import magnitude_quantile
from hf_lowbit.config import ConfigError
from hf_lowbit.formats import decode
from hf_lowbit.nn import Hadamard, PackedLinear
from hf_lowbit.plan import PlanError, packed_modules
from hf_lowbit.reporting import Report
from hf_lowbit_quamba import QuambaConfig
from hf_lowbit_quamba.recipe import make_recipe
from tests.integrations.tiny_state_space import TINY, relative, step, tokens
from tests.matrix.models import MODELS, fingerprint
from tests.plugins.outliers import walk

NAIVE = {"percentile": 100, "state_percentile": 100, "hadamard": False}
DEBIAN = Path(__file__).parents[1] / "assets" / "mamba-debian"


def batches(count: int = 4) -> list[dict[str, Tensor]]:
    """Two sequences of 40 tokens each."""
    return [{"input_ids": tokens(2, 40, seed)} for seed in range(count)]


def outlier_mamba() -> Any:
    """A few channels of the scan's output are far larger than its input, and a few tokens' inputs than the others."""
    model = TINY["mamba"].create()
    for layer in model.backbone.layers:
        layer.mixer.D.data[[5, 40]] *= 40
        layer.mixer.out_proj.weight.data[:, [5, 40]] /= 40
    return model


def quantized(model: Any, config: QuambaConfig | None = None) -> Any:
    """In place, on :func:`batches`."""
    return hf_lowbit.quantize(model, replace(config or QuambaConfig(), dataset=batches(), num_samples=8))


@torch.no_grad()
def logits_of(model: Any) -> Tensor:
    """For tokens that nothing was calibrated on."""
    logits: Tensor = model(tokens(2, 48, seed=9)).logits
    return logits


def report(model: Any) -> Report:
    return hf_lowbit.report(model)


def rewritten(model: Any) -> Any:
    """The float model with norms without gain and output projections that read rotated inputs, rotated by hooks."""
    blocks: list[nn.Module] = []

    def rewrite(block: Block) -> None:
        fold_gains(block)
        rotate_outputs(block)
        (matrix,) = (matrix for key, matrix in block.matrices.items() if key == "mixer.out_proj.weight")
        layer = matrix.skeleton
        assert isinstance(layer, PackedLinear) and layer.layer_spec.transform == Hadamard(64)
        changed = copy.deepcopy(block.module)
        projection: Any = changed.get_submodule("mixer.out_proj")
        projection.weight.data = matrix.weight.clone()
        projection.register_forward_pre_hook(lambda module, args: (layer.transformed(args[0]),))
        blocks.append(changed)

    walk(copy.deepcopy(model), rewrite, batches(), QuambaConfig())
    model.backbone.layers = nn.ModuleList(blocks)
    return model


# 1, 2
@torch.no_grad()
def test_the_rewritten_model_computes_the_same() -> None:
    """In prefill and, with a cache, token by token; without what is rotated online it does not."""
    original, x = outlier_mamba(), tokens(2, 24, seed=9)
    model = rewritten(copy.deepcopy(original))
    for changed, own in zip(model.backbone.layers, original.backbone.layers, strict=True):
        assert bool((changed.norm.weight == 1).all()) and not bool((own.norm.weight == 1).any())
    assert relative(model(x).logits, original(x).logits) < 1e-5
    caches = [m(x[:, :20], use_cache=True).cache_params for m in (model, original)]
    for token in range(20, 24):
        new, old = (step(m, x[:, token : token + 1], cache) for m, cache in zip((model, original), caches, strict=True))
        assert relative(new, old) < 1e-5
    for layer in model.backbone.layers:
        layer.mixer.out_proj._forward_pre_hooks.clear()
    assert relative(model(x).logits, original(x).logits) > 0.1


# 6
@pytest.mark.parametrize(("rotate", "state_scales"), [(False, "tensor"), (True, "channel")])
def test_reload_is_exact(rotate: bool, state_scales: str, tmp_path: Path) -> None:
    model = TINY["mamba"].create()
    model.tie_weights()
    quantized(model, QuambaConfig(rotate=rotate, state_scales=state_scales))
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert fingerprint(reloaded) == fingerprint(model)
    assert torch.equal(logits_of(reloaded), logits_of(model))
    if rotate:
        assert not reloaded.config.tie_word_embeddings
        assert any("stream is rotated" in note for note in report(model).warnings)


def simulated(mixer: Any, hidden: Tensor, limit: int = 127) -> tuple[Tensor, Tensor]:
    """A mixer's output and last state for ``[1, T, hidden]``, each in float64 arithmetic on rounded floats.

    With another ``limit`` than the codes' the same ranges are divided into more steps.
    """

    def rounded(x: Tensor, scale: Tensor) -> Tensor:
        step = scale.double() * 127 / limit
        return (x / step).round().clamp(-limit, limit) * step

    def product(name: str, x: Tensor) -> Tensor:
        layer = mixer.get_submodule(name)
        return rounded(x, layer.input_scale()) @ decode(layer.packed()).double().t()

    def bias(name: str) -> Tensor:
        return mixer.get_submodule(name).bias.double()

    n, scale = mixer.geometry.state, mixer.site_scale
    x, z = rounded(product("in_proj", hidden.double()) + bias("in_proj"), scale("in")).chunk(2, -1)
    kernel = decode(mixer.conv1d.packed()).double().unsqueeze(1)
    x = functional.conv1d(x.transpose(1, 2), kernel, bias("conv1d"), padding=3, groups=len(kernel))
    x = rounded(functional.silu(x[..., : hidden.shape[1]].transpose(1, 2)), scale("x"))
    both = rounded(product("x_proj", x), scale("x_proj"))
    steps, b, c = both.split([both.shape[-1] - 2 * n, n, n], -1)
    steps = functional.softplus(rounded(product("dt_proj", steps), scale("dt")) + bias("dt_proj"))
    decay = -torch.exp(decode(mixer.packed("A_log")).double())
    state, outputs = torch.zeros_like(decay), []
    for t in range(hidden.shape[1]):
        step = steps[0, t].unsqueeze(1)
        state = torch.exp(step * decay) * state + step * b[0, t] * x[0, t].unsqueeze(1)
        outputs.append(state @ c[0, t])
    y = (torch.stack(outputs)[None] + decode(mixer.packed("D")).double() * x) * functional.silu(z)
    return product("out_proj", mixer.out_proj.transformed(y)) + bias("out_proj"), state


# 3
@torch.no_grad()
def test_the_mixer_computes_what_rounded_floats_do() -> None:
    """But for single codes on the edge between two: the method page's forward, written down once more."""
    model, read = quantized(outlier_mamba()), dict[str, Tensor]()
    for name, layer in enumerate(model.backbone.layers):
        layer.mixer.register_forward_pre_hook(
            lambda module, args, name=name: read.update({str(name): args[0]}), with_kwargs=False
        )
    model(tokens(1, 32, seed=9))
    for name, layer in enumerate(model.backbone.layers):
        hidden, mixer = read[str(name)], layer.mixer
        cache = DynamicCache(config=model.config)
        output, state = simulated(mixer, hidden)
        assert relative(mixer(hidden, cache_params=cache), output) < 5e-3
        codes, scale = cache.get_recurrent_state(mixer.layer_idx), mixer.site_scale("state")
        assert codes.dtype == torch.int8 and cache.get_conv_state(mixer.layer_idx).dtype == torch.int8
        expected = (state / scale.double()).round().clamp(-127, 127)
        assert float((codes[0].double() - expected).abs().max()) <= 1


# 3
@torch.no_grad()
def test_finer_steps_converge_to_the_float_model() -> None:
    """Nothing but the rounding stands between the two: its error falls as the steps do, to that of float32."""
    config = QuambaConfig(percentile=100, state_percentile=100)  # and half of what was seen then is never clipped
    model, read = quantized(outlier_mamba(), config), dict[int, Tensor]()
    for index, layer in enumerate(model.backbone.layers):
        layer.mixer.register_forward_pre_hook(lambda module, args, index=index: read.update({index: args[0]}))
    model(batches()[0]["input_ids"][:1])
    floats = hf_lowbit.dequantize(copy.deepcopy(model))
    for index, layer in enumerate(model.backbone.layers):
        hidden = read[index] / 2
        expected = floats.backbone.layers[index].mixer(hidden)
        errors = [relative(simulated(layer.mixer, hidden, 2**bits - 1)[0], expected) for bits in (7, 10, 13, 24)]
        assert all(fine < coarse / 4 for coarse, fine in pairwise(errors)) and errors[-1] < 2e-5, errors


@cache
@torch.no_grad()
def debian() -> tuple[Any, Tensor, list[Tensor], list[Tensor]]:
    """A trained model, tokens, and what the scan of each block reads and returns, x and y ``[tokens, 512]``."""
    model = AutoModelForCausalLM.from_pretrained(DEBIAN, dtype=torch.float32).eval()
    text = (DEBIAN.parent / "debian-text" / "calibration.txt").read_text()[20_000:30_000]
    ids = AutoTokenizer.from_pretrained(DEBIAN)(text, return_tensors="pt").input_ids[:, :1024].view(8, 128)
    read: dict[str, list[Tensor]] = {"x_proj": [], "out_proj": []}
    handles = [
        layer.mixer.get_submodule(name).register_forward_pre_hook(lambda module, args, own=own: own.append(args[0]))
        for layer in model.backbone.layers
        for name, own in read.items()
    ]
    model(ids)
    for handle in handles:
        handle.remove()
    x, y = ([each.reshape(-1, each.shape[-1]) for each in values] for values in read.values())
    return model, ids, x, y


# 5
def test_the_output_of_the_scan_loses_its_outliers() -> None:
    def kurtosis(x: Tensor) -> float:
        return float((x**4).mean() / x.square().mean() ** 2)

    def error(x: Tensor) -> float:
        scale = x.abs().max() / 127
        return float(((x / scale).round() * scale - x).square().mean())

    outputs = debian()[3]
    rotated = [Hadamard(512).inputs(y, {}) for y in outputs]
    assert all(relative(new.norm(), old.norm()) < 1e-4 for new, old in zip(rotated, outputs, strict=True))
    for measure, share in ((lambda x: float(x.abs().max()), 0.5), (kurtosis, 0.1), (error, 0.2)):
        ratios = [measure(new) / measure(old) for new, old in zip(rotated, outputs, strict=True)]
        assert max(ratios) < share, ratios


# 5
def test_a_clipped_input_rounds_finer_but_for_the_largest() -> None:
    for x in debian()[2]:
        limits = {name: magnitude_quantile(x.flatten()[None], p) for name, p in (("all", 100.0), ("most", 99.9))}
        bulk = x.abs() <= limits["most"]
        errors = {
            name: (x / (limit / 127)).round().clamp(-127, 127) * (limit / 127) - x for name, limit in limits.items()
        }
        assert errors["most"][bulk].square().mean() < 0.8 * errors["all"][bulk].square().mean()
        assert errors["most"].abs().max() > 2 * errors["all"].abs().max()


@torch.no_grad()
def test_naive_static_scales_lose_far_more() -> None:
    """KL(float || quantized), which on 4,096 held-out tokens is 0.010 against 0.264; here on 256."""
    model, ids, _, _ = debian()
    expected, loss = model(ids[4:6]).logits.log_softmax(-1), []
    for values in ({}, NAIVE):
        config = QuambaConfig(dataset=[{"input_ids": ids[:4, :64]}], num_samples=4, **values)
        predicted = hf_lowbit.quantize(copy.deepcopy(model), config)(ids[4:6]).logits.log_softmax(-1)
        loss.append(float((expected.exp() * (expected - predicted)).sum(-1).mean()))
    assert loss[0] < 0.03 and loss[1] > 5 * loss[0]


def test_layers_share_the_scales_of_what_they_read() -> None:
    model = quantized(outlier_mamba())
    for layer in model.backbone.layers:
        mixer = layer.mixer
        assert set(mixer.sites()) == {"in", "x", "x_proj", "dt", "state"}
        assert torch.equal(mixer.x_proj.input_scale(), mixer.site_scale("x"))
        assert torch.equal(mixer.dt_proj.input_scale(), mixer.site_scale("x_proj"))
        assert mixer.in_proj.input_scale() is not None and mixer.out_proj.input_scale() is not None
        assert mixer.out_proj.layer_spec.transform == Hadamard(64)
        assert all(mixer.get_submodule(name).layer_spec.transform is None for name in ("in_proj", "x_proj", "dt_proj"))
    weights = {
        f"{name.removeprefix('backbone.layers.0.mixer').removeprefix('.')}.{parameter}"
        for name, module in packed_modules(model).items()
        for parameter in module.packed_parameters
        if name.startswith("backbone.layers.0.")
    }
    layers = {f"{name}.weight" for name in ("in_proj", "conv1d", "x_proj", "dt_proj", "out_proj")}
    assert weights == {".A_log", ".D", *layers}


@torch.no_grad()
def test_a_state_with_a_scale_for_each_channel_keeps_more_of_itself() -> None:
    """Token by token, where every token reads it from its codes."""
    reference, x, error = TINY["mamba"].create(), tokens(2, 40, seed=9), {}
    for layer in reference.backbone.layers:
        layer.mixer.dt_proj.bias.data[::2] -= 4  # half of the channels change slowly, and so are small
    expected = reference(x).logits
    for scales in ("tensor", "channel"):
        model = quantized(copy.deepcopy(reference), QuambaConfig(state_scales=scales, state_percentile=100))
        prompt = model(x[:, :8], use_cache=True)
        steps = [step(model, x[:, token : token + 1], prompt.cache_params) for token in range(8, 40)]
        error[scales] = relative(torch.cat([prompt.logits, *steps], 1), expected)
        assert model.backbone.layers[0].mixer.site_scale("state").shape == ((64,) if scales == "channel" else (1,))
    assert error["channel"] < 0.8 * error["tensor"]


def test_a_block_in_floats() -> None:
    """W8A16 in one block: nothing of it is quantized but the weights."""
    model = quantized(outlier_mamba(), QuambaConfig(overrides={"layers.1": {"activation_bits": None}}))
    quantizing, floating = (layer.mixer for layer in model.backbone.layers)
    assert quantizing.sites() and not floating.sites()
    specs = [module.layer_spec for module in packed_modules(floating).values()]
    assert len(specs) == 6 and all(spec.activation is None and spec.transform is None for spec in specs)


def test_a_mixer_without_usable_ranges_computes_in_floats() -> None:
    """The second block's state exceeds float32."""
    model = outlier_mamba()
    mixer = model.backbone.layers[1].mixer
    mixer.dt_proj.bias.data[0], mixer.conv1d.bias.data[0] = 3e38, 1e6
    quantized(model)
    first, second = (layer.mixer for layer in model.backbone.layers)
    assert first.sites() and not second.sites()
    assert any("so that the mixer computes in floats" in note for note in report(model).warnings)


def test_a_killed_run_resumes(tmp_path: Path) -> None:
    """With the first block from the earlier run, scales of sites and all."""

    class Killed(Exception):
        pass

    def killing(block: Block) -> None:
        if block.name == "backbone.layers.1":
            raise Killed
        calibrate(block)

    def resuming(block: Block) -> None:
        assert block.name == "backbone.layers.1"
        calibrate(block)

    calibrate, config = make_recipe(QuambaConfig()).calibrate, QuambaConfig()
    assert calibrate is not None
    expected, killed, resumed = outlier_mamba(), outlier_mamba(), outlier_mamba()
    walk(expected, calibrate, batches(), config)
    with pytest.raises(Killed):
        walk(killed, killing, batches(), config, checkpoint=Checkpoint(tmp_path / "run", "same", True))
    walk(resumed, resuming, batches(), config, checkpoint=Checkpoint(tmp_path / "run", "same", True))
    assert fingerprint(resumed) == fingerprint(expected)
    assert any(name.endswith("layers.0.mixer.site_state_scale") for name in fingerprint(resumed))


def test_scales_made_as_inputs_come_are_refused() -> None:
    """Not of a projection alone, whose input no site shares."""
    with pytest.raises(PlanError, match=r"layers.1.mixer: what a mixer computes has stored scales"):
        quantized(outlier_mamba(), QuambaConfig(overrides={"layers.1": {"activation_static": False}}))
    model = quantized(outlier_mamba(), QuambaConfig(overrides={"in_proj": {"activation_static": False}}))
    assert model.backbone.layers[0].mixer.in_proj.input_scale() is None


def test_a_projection_of_other_inputs_has_scales_of_its_own() -> None:
    model = quantized(outlier_mamba(), QuambaConfig(overrides={"x_proj": {"activation_bits": 4}}))
    mixer = model.backbone.layers[0].mixer
    largest = mixer.site_scale("x") * 127
    assert float(mixer.x_proj.input_scale()) == pytest.approx(float(largest) / 7, rel=0.1)


def test_mamba_2_is_for_quamba_2() -> None:
    with pytest.raises(PlanError, match=r"mixer of Mamba-2.* use Quamba2Config, or any_generation=True"):
        quantized(TINY["mamba2"].create())
    model = quantized(TINY["mamba2"].create(), QuambaConfig(any_generation=True))
    mixer = model.backbone.layers[0].mixer
    assert set(mixer.sites().values()) == {(1,)}
    with pytest.raises(PlanError, match="is of generation 1; generation 2 has clusters"):
        quantized(TINY["mamba2"].create(), QuambaConfig(any_generation=True, state_scales="channel"))
    assert bool(torch.isfinite(logits_of(model)).all())


def test_a_model_without_mixers() -> None:
    model = MODELS["llama_tied"].build().eval()
    before = fingerprint(model)
    with pytest.raises(PlanError, match="mixer"):
        quantized(model)
    assert fingerprint(model) == before


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bits": 4}, "bits must be 8, not 4"),
        ({"activation_bits": None, "activation_static": False}, "activation_bits must be 8, not None"),
        ({"activation_static": False}, "activation_static must be True, not False"),
        ({"activation_symmetric": False}, "inputs are symmetric integers"),
        ({"percentile": 0}, "percentile must lie above 0 and at most at 100, not 0"),
        ({"percentile": True}, "percentile must lie above 0 and at most at 100, not True"),
        ({"state_percentile": 101}, "state_percentile must lie above 0 and at most at 100, not 101"),
        ({"percentile_sigma": 1.5}, "percentile_sigma must lie above 0 and at most at 1, not 1.5"),
        ({"state_scales": "row"}, "state_scales must be 'tensor' or 'channel', not 'row'"),
        ({"hadamard": 1}, "hadamard must be True or False, not 1"),
        ({"rotate": None}, "rotate must be True or False, not None"),
        ({"any_generation": "yes"}, "any_generation must be True or False, not 'yes'"),
    ],
)
def test_refusals(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"QuambaConfig: {message}"):
        QuambaConfig(**values)
