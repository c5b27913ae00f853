"""Quantized mixers with transformers' caches: int8 states, generation, and caches that are not theirs."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

import hf_lowbit
from hf_lowbit.calibration.units import without_cache
from hf_lowbit.nn import PackedMixer
from hf_lowbit.plan import packed_modules
from hf_lowbit_quamba2 import Quamba2Config
from tests.integrations.tiny_state_space import TINY, config_of, folder, loaded, packed_floats, relative, step, tokens
from tests.matrix.models import fingerprint


@pytest.fixture(params=TINY)
def name(request: Any) -> str:
    return str(request.param)


def mixers(model: nn.Module) -> dict[str, PackedMixer]:
    return {key: module for key, module in packed_modules(model).items() if isinstance(module, PackedMixer)}


def states(model: nn.Module, cache: Any) -> list[Tensor]:
    indices = [mixer.layer_idx for mixer in mixers(model).values()]
    return [read(index) for index in indices for read in (cache.get_conv_state, cache.get_recurrent_state)]


def fresh(model: Any, static: bool = False) -> Any:
    return StaticCache(config=model.config, max_cache_len=64) if static else DynamicCache(config=model.config)


@torch.no_grad()
def test_every_mixer_is_packed_whole_and_comes_back_bit_equal(name: str) -> None:
    model, again = loaded(name), loaded(name)
    found = mixers(model)
    assert len(found) == len([m for m in TINY[name].create().modules() if hasattr(m, "A_log")])
    for mixer in found.values():
        parts = ["A_log", "D", "in_proj.weight", "conv1d.weight", "out_proj.weight"]
        parts += ["x_proj.weight", "dt_proj.weight"] if TINY[name].generation == 1 else []
        assert all(not mixer.get_parameter(part).is_floating_point() for part in parts)
        assert set(mixer.sites()) and all(mixer.site_scale(site) is not None for site in mixer.sites())
    assert fingerprint(model) == fingerprint(again)
    x = tokens(2, 17)
    assert torch.equal(model(x).logits, again(x).logits)


@torch.no_grad()
def test_logits_are_close_to_the_float_models(name: str) -> None:
    x = tokens(4, 24)
    error = relative(loaded(name)(x).logits, TINY[name].create()(x).logits)
    assert 0 < error < 0.25  # random models, whose logits all count alike


@torch.no_grad()
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_states_are_int8_in_the_librarys_shapes(name: str, static: bool) -> None:
    model, stock = loaded(name), TINY[name].create()
    caches = [fresh(model, static), fresh(stock, static)]
    for part in tokens(2, 9).split([7, 1, 1], 1):
        for owner, cache in zip((model, stock), caches, strict=True):
            step(owner, part, cache)
        ours, theirs = states(model, caches[0]), states(model, caches[1])
        assert {state.dtype for state in ours} == {torch.int8}
        assert [state.shape for state in ours] == [state.shape for state in theirs]
        assert all(state.abs().max() > 0 for state in ours)


@torch.no_grad()
def test_decoding_and_chunked_prefill_follow_the_whole_sequence(name: str) -> None:
    """They differ from it by the rounding of the state alone: as floats it gives the same logits."""
    model, x = loaded(name), tokens(2, 18)
    whole = model(x, use_cache=False).logits
    for state_is_coded, limit in ((True, 0.2), (False, 0.01)):
        for mixer in mixers(model).values():
            if not state_is_coded:
                del mixer.site_state_scale
        for cuts in ([10, *[1] * 8], [10, 5, 3], [1, 17]):
            cache = fresh(model)
            parts = [step(model, part, cache) for part in x.split(cuts, 1)]
            assert relative(torch.cat(parts, 1), whole) < limit


@torch.no_grad()
def test_a_static_cache_is_bit_equal_to_a_dynamic_one_and_a_reset_one_to_a_new_one(name: str) -> None:
    model, x = loaded(name), tokens(2, 12)
    outputs = []
    for cache in (fresh(model), fresh(model, static=True)):
        for _ in range(2):
            outputs.append(torch.cat([step(model, part, cache) for part in x.split([9, 1, 1, 1], 1)], 1))
            cache.reset()
    assert all(relative(output, outputs[0]) < 1e-6 for output in outputs[1:])  # attention sums over another length


@torch.no_grad()
def test_a_cache_that_records_its_past_changes_nothing(name: str) -> None:
    """As assisted generation asks for it: the convolution's inputs stay in the cache until it is cropped."""
    model, x = loaded(name), tokens(2, 12)
    plain, recording = fresh(model), fresh(model)
    for mixer in mixers(model).values():
        recording.layers[mixer.layer_idx].activate_past_recording()
    for part in x.split([7, 1, 3, 1], 1):
        assert relative(step(model, part, recording), step(model, part, plain)) < 1e-5
    for mixer in mixers(model).values():
        kept = recording.get_conv_state(mixer.layer_idx)
        assert kept.shape[-1] >= 12 and kept.dtype == torch.int8
        assert torch.equal(kept[..., -mixer.geometry.taps :], plain.get_conv_state(mixer.layer_idx))


@torch.no_grad()
def test_beams_take_their_states_along(name: str) -> None:
    """After a reorder each row goes on as the row that it came from."""
    model, x = loaded(name), tokens(3, 8)
    cache, other = fresh(model), fresh(model)
    step(model, x, cache)
    order = torch.tensor([2, 0, 0])
    cache.reorder_cache(order)
    step(model, x[order], other)
    following = tokens(3, 1, seed=9)
    assert relative(step(model, following, cache), step(model, following, other)) < 1e-5


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_generates(name: str, padded: bool) -> None:
    """The same tokens with every cache, as many as asked for; and with beams."""
    model, x = loaded(name), tokens(2, 9)
    mask = torch.ones_like(x)
    mask[0, : 4 if padded else 0] = 0
    asked = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    greedy = model.generate(x, **asked)
    assert greedy.shape == (2, 15)
    static = model.generate(x, **asked, cache_implementation="static", disable_compile=True)
    assert torch.equal(static, greedy)
    assert model.generate(x, **asked, num_beams=3).shape == (2, 15)


@torch.no_grad()
def test_left_padding_is_as_good_as_none(name: str) -> None:
    """But the bias of in_proj enters the convolution at padded tokens, in the library, too."""
    model = loaded(name)
    is_biased = any(mixer.in_proj.bias is not None for mixer in mixers(model).values())
    x = tokens(2, 12)
    x[0, :4] = 0
    mask = torch.ones_like(x)
    mask[0, :4] = 0
    together = model(x, attention_mask=mask, use_cache=False).logits[0, 4:]
    change = relative(together, model(x[:1, 4:], use_cache=False).logits[0])
    assert (change > 0.03) == is_biased  # below it: single codes may go the other way


@torch.no_grad()
def test_a_float_models_cache_is_refused_by_name(name: str) -> None:
    model, x = loaded(name), tokens(2, 6)
    for other in (TINY[name].create(), packed_floats(TINY[name].create())):
        for cut in (1, 2):
            cache = fresh(model)
            step(other, x, cache)
            with pytest.raises(ValueError, match=r"cache.*float"):
                step(model, x[:, :cut], cache)


@torch.no_grad()
def test_a_cache_of_codes_is_refused_by_a_mixer_of_floats(name: str) -> None:
    model, floats, x = loaded(name), packed_floats(TINY[name].create()), tokens(2, 6)
    for cut in (1, 2):
        cache = fresh(model)
        step(model, x, cache)
        with pytest.raises(ValueError, match=r"cache.*int8"):
            step(floats, x[:, :cut], cache)


@torch.no_grad()
def test_a_cache_that_was_only_reset_is_refused_too(name: str) -> None:
    """transformers keeps the tensors of a cache that it resets, and their type."""
    model, x = loaded(name), tokens(2, 6)
    for first, second in ((packed_floats(TINY[name].create()), model), (model, packed_floats(TINY[name].create()))):
        cache = fresh(model)
        step(first, x, cache)
        cache.reset()
        with pytest.raises(ValueError, match="cache"):
            step(second, x, cache)


@torch.no_grad()
def test_a_cache_of_another_batch_is_refused(name: str) -> None:
    model = loaded(name)
    for cut in (1, 2):
        cache = fresh(model)
        step(model, tokens(2, 6), cache)
        with pytest.raises((ValueError, RuntimeError)):
            step(model, tokens(3, cut), cache)


def test_the_cache_is_a_quarter_of_the_librarys(name: str) -> None:
    model, stock, x = loaded(name), TINY[name].create(), tokens(1, 5)
    ours, theirs = fresh(model), fresh(stock)
    step(model, x, ours), step(stock, x, theirs)
    sizes = [sum(state.numel() * state.element_size() for state in states(model, cache)) for cache in (ours, theirs)]
    assert sizes[0] * 4 == sizes[1]


def test_the_folder_holds_no_float_copy(name: str) -> None:
    from safetensors import safe_open

    with safe_open(folder(name) / "model.safetensors", "pt") as file:
        floats = {key for key in file.keys() if file.get_tensor(key).is_floating_point()}  # noqa: SIM118
    own = {key.removeprefix(f"{mixer}.") for mixer in mixers(loaded(name)) for key in floats if key.startswith(mixer)}
    assert not {key for key in own if key.split(".")[0] in ("A_log", "D") or key.endswith("proj.weight")}


def test_quantized_while_it_loads(name: str, tmp_path: Path) -> None:
    """from_pretrained with the data in the config, in bfloat16; saved and loaded again, bit-equal."""
    data = [{"input_ids": tokens(4, 24, seed)} for seed in range(2, 6)]
    TINY[name].create().save_pretrained(tmp_path / "float")
    load = partial(AutoModelForCausalLM.from_pretrained, dtype=torch.bfloat16)
    model = load(tmp_path / "float", quantization_config=config_of(name, dataset=data)).eval()
    model.save_pretrained(tmp_path / "packed")
    again = load(tmp_path / "packed").eval()
    assert fingerprint(again) == fingerprint(model)
    x = tokens(2, 9)
    caches = fresh(model), fresh(model)
    for part in x.split([7, 1, 1], 1):
        assert torch.equal(step(model, part, caches[0]), step(again, part, caches[1]))
    assert {state.dtype for state in states(model, caches[0])} == {torch.int8}


@torch.no_grad()
def test_four_bit_weights_and_float_values(name: str) -> None:
    """W4A16: the cache holds the library's floats, so that decoding follows the whole sequence to their precision."""
    config = Quamba2Config(bits=4, group_size=16, activation_bits=None, rotate=False, num_samples=16)
    data = [{"input_ids": tokens(4, 24, seed)} for seed in range(2, 6)]
    model, x = hf_lowbit.quantize(TINY[name].create(), config, data=data), tokens(2, 14)
    assert all(mixer.in_proj.layer_spec.weight.bits == 4 and not mixer.sites() for mixer in mixers(model).values())
    cache = fresh(model)
    parts = [step(model, part, cache) for part in x.split([8, 4, 1, 1], 1)]
    assert relative(torch.cat(parts, 1), model(x, use_cache=False).logits) < 1e-4
    assert all(state.is_floating_point() for state in states(model, cache))


def test_calibration_keeps_no_cache(name: str) -> None:
    """GraniteMoeHybrid's forward takes use_cache without naming it; states of one batch would flow into the next."""
    model = TINY[name].create()
    assert without_cache(model, {"input_ids": tokens(1, 4)})["use_cache"] is False
