"""Bits for the layers of a pipeline's denoiser: groups, scores, budgets, what is kept, and the config that results."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import hf_lowbit
from hf_lowbit.allocation import AllocationError
from hf_lowbit.calibration.checkpoint import ResumeError
from hf_lowbit.calibration.divergence import SensitivityError
from hf_lowbit.plan import packed_modules
from hf_lowbit.search.pipeline import PipelineSearchResult, search_pipeline
from hf_lowbit.search.pipeline.groups import CONTENT, QUALITY, group_layers
from hf_lowbit.search.pipeline.inputs import InputRange
from hf_lowbit.search.pipeline.judge import MOST_DB, Judge
from hf_lowbit.search.pipeline.measurements import Measurements
from hf_lowbit_mixdq import MixDQConfig
from tests.plugins.denoisers import pipeline_of

PROMPTS = ["a photo of a bag", "a photo of a coat"]
FEW = [r"(?!(conv_in|conv_out|up_blocks\.1\.attentions\..*)$).*"]  # what stays float
CONFIG = MixDQConfig(modules_to_not_convert=FEW, overrides={"conv_in": {"bits": 8}})
SMALL: dict[str, Any] = {"steps": 2, "pictures": 2, "samples": 4, "scan": (10, 10), "height": 32, "width": 32}


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("search") / "measurements.json"


@pytest.fixture(scope="module")
def found(kept: Path) -> PipelineSearchResult:
    return search_pipeline(pipeline_of("sd-fashion"), CONFIG, PROMPTS, bits_per_weight=4.0, measurements=kept, **SMALL)


def test_groups_match_components_and_what_lies_beside_layers_that_read_the_text() -> None:
    """The specification's pitfall: "ff" is a component, not any text within a name."""
    names = [
        "blocks.0.ff.net.2",
        "diffusion.proj",
        "blocks.0.attn2.to_q",
        "blocks.0.attn1.to_q",
        "other.query",
        "effect",
    ]
    groups = group_layers(names, ["other.key"])
    assert [name for name, group in groups.items() if group == CONTENT] == [
        "blocks.0.ff.net.2", "blocks.0.attn2.to_q", "other.query",
    ]  # fmt: skip
    assert group_layers(["a.add_k_proj", "a.to_q", "b.to_q"], [])["a.to_q"] == CONTENT
    assert group_layers(["context_embedder", "b.to_q"], ["context_embedder"])["b.to_q"] == QUALITY
    assert group_layers(names, [], ["effect"])["effect"] == CONTENT


def test_scores_of_every_width_and_the_budget(found: PipelineSearchResult) -> None:
    """The specification's tests 2 and 4: means within the budget, scores that grow with bits for nearly all layers."""
    assert 3.6 < found.mean_bits <= 4.0
    assert found.mean_input_bits <= 8.0
    by_name = {layer.name: layer for layer in found.layers}
    assert by_name["conv_in"].bits == 8 and by_name["conv_in"].weight_scores == {8: 0.0}  # given, not measured
    assert by_name["conv_out"].group == QUALITY and set(by_name["conv_out"].weight_scores) == {4, 8}
    content = [layer for layer in found.layers if layer.group == CONTENT]
    assert all(set(layer.weight_scores) == {2, 4, 8} and max(layer.weight_scores.values()) <= 1 for layer in content)
    rising = [list(scores) == sorted(scores, key=scores.__getitem__) for layer in found.layers
              for scores in (layer.weight_scores, layer.input_scores)]  # fmt: skip
    assert sum(rising) >= 0.9 * len(rising)
    drawn = [c for c in found.candidates if c.what == "weights"]
    assert len(drawn) > 1 and found.candidates.index(drawn[-1]) == len(drawn) - 1  # weights first
    assert min(c.pixel_error for c in drawn) > 0


def test_the_most_sensitive_inputs_of_each_group_are_protected(found: PipelineSearchResult) -> None:
    for group in (CONTENT, QUALITY):
        own = [layer for layer in found.layers if layer.group == group]
        protected = [layer for layer in own if layer.protected]
        assert len(protected) == 1 and protected[0].input_bits is None
        assert protected[0].input_scores[8] == min(layer.input_scores[8] for layer in own)
    assert all(layer.input_bits in (4, 8) for layer in found.layers if not layer.protected)


@torch.no_grad()
def test_the_config_is_applied_with_data_and_without(found: PipelineSearchResult, tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel

    config = MixDQConfig.from_dict(json.loads(json.dumps(found.config.to_dict())))
    folder = Path(pipeline_of("sd-fashion").config._name_or_path) / "unet"
    model = UNet2DConditionModel.from_pretrained(folder, quantization_config=config, torch_dtype=torch.float32)
    modules = packed_modules(model)
    assert {name: module.layer_spec.weight.bits for name, module in modules.items()} == {
        layer.name: layer.bits for layer in found.layers
    }
    widths = {n: None if m.layer_spec.activation is None else m.layer_spec.activation.bits for n, m in modules.items()}
    assert widths == {layer.name: layer.input_bits for layer in found.layers}
    assert not config.has_static_inputs and config.copy_with_data(None, drawn=True).has_static_inputs


def test_another_budget_needs_no_new_measurements(
    found: PipelineSearchResult, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Judge) -> float:
        raise AssertionError("measured again")

    monkeypatch.setattr(Judge, "similarity", refuse)
    monkeypatch.setattr(Judge, "noise_ratio", refuse)
    monkeypatch.setattr(Judge, "pixel_error", lambda _: 0.0)
    again = search_pipeline(
        pipeline_of("sd-fashion"), CONFIG, PROMPTS, bits_per_weight=5.0, bits_per_input=None,
        measurements=kept, **SMALL,
    )  # fmt: skip
    assert again.mean_bits == pytest.approx(4.85, abs=0.2) and not any(layer.input_bits for layer in again.layers)
    with pytest.raises(ResumeError, match="other prompts"):
        search_pipeline(pipeline_of("sd-fashion"), CONFIG, PROMPTS[:1], measurements=kept, **SMALL)


def test_the_pipeline_is_as_it_was(found: PipelineSearchResult) -> None:
    unet = pipeline_of("sd-fashion").unet
    assert not packed_modules(unet) and not any(module._forward_pre_hooks for module in unet.modules())
    stored = type(unet).from_pretrained(Path(pipeline_of("sd-fashion").config._name_or_path) / "unet")
    assert all(torch.equal(unet.get_parameter(name), value) for name, value in stored.named_parameters())


def test_a_pipeline_that_draws_classes() -> None:
    config = MixDQConfig(modules_to_not_convert=[r"(?!.*transformer_blocks\.0\.(ff|attn1)\.).*"])
    found = search_pipeline(
        pipeline_of("dit-fashion"), config, [3], steps=1, bits_per_weight=8.0, bits_per_input=None, candidates=(4, 8),
        pictures=1, samples=2,
    )  # fmt: skip
    assert found.component == "transformer" and found.mean_bits == 8 and not found.candidates
    assert {layer.group for layer in found.layers} == {CONTENT, QUALITY}
    assert all(".ff." in layer.name for layer in found.layers if layer.group == CONTENT)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits_per_weight": 1.5}, "1.5 bits per weight cannot be reached: these candidates have means of"),
        ({"bits_per_weight": 9.0}, "cannot be reached"),
        ({"prompts": None}, "draws pictures: pass prompts="),
        ({"prompts": []}, "draws pictures: pass prompts="),
        ({"objective": "guess"}, "unknown objective 'guess'; known: score, noise"),
        ({"protect": 1.0}, "protect must be a share"),
        ({"pictures": 0}, "pictures must be a positive integer"),
        ({"scan": (0, 1)}, "how many budgets and how many ratios"),
        ({"candidates": ()}, "candidates must be a list of bits"),
        ({"component": "decoder"}, "has no component decoder"),
        ({"config": "nothing"}, "unknown method 'nothing'"),
    ],
)
def test_wrong_requests_are_refused_before_anything_is_drawn(
    change: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = pipeline_of("sd-fashion")
    monkeypatch.setattr(type(pipeline), "__call__", lambda *_, **__: pytest.fail("drawn"))
    asked = {"config": "mixdq", "prompts": PROMPTS, **SMALL, **change}
    with pytest.raises((hf_lowbit.ConfigError, AllocationError), match=message):
        search_pipeline(pipeline, **asked)


def test_ranges_leave_out_the_first_token_and_hold_zero_exactly() -> None:
    known = InputRange((4, 2), without_first=True)
    x = torch.randn(3, 5, 6)
    x[:, 0], x[..., 4:] = 1000.0, x[..., 4:] * 50
    x[:, 0] = 1000.0
    known.update(x)
    rounded = known.rounded(x, 8)
    assert torch.equal(rounded[:, 0], x[:, 0]) and known.size == 24
    steps = torch.stack([known.high - known.low]).flatten() / 255
    error = (rounded - x)[:, 1:].abs()
    assert (error[..., :4] <= steps[0] * 0.51).all() and (error[..., 4:] <= steps[1] * 0.51).all()
    assert (known.rounded(torch.zeros_like(x), 4)[:, 1:] == 0).all()


def test_equal_outputs_and_broken_ones() -> None:
    layer = nn.Linear(4, 4).requires_grad_(False)
    judge = Judge(layer, lambda: torch.full((1, 1, 4, 4), 0.5), [{"input": torch.ones(2, 4)}])
    assert judge.noise_ratio() == MOST_DB and judge.similarity() == 1 and judge.pixel_error() == 0
    layer.weight[0, 0] = float("nan")
    with pytest.raises(SensitivityError, match="NaN"):
        judge.noise_ratio()


def test_measurements_survive_and_belong_to_one_request(tmp_path: Path) -> None:
    path = tmp_path / "kept.json"
    first = Measurements(path, "a")
    calls: list[int] = []
    measure: Callable[[], float] = lambda: float(len(calls) or calls.append(1) or 7)  # noqa: E731
    assert first.get("x", measure) == 7.0
    again = Measurements(path, "a")
    assert again.taken == 1 and "x" in again and again.get("x", lambda: pytest.fail("measured")) == 7.0
    with pytest.raises(ResumeError, match="another model"):
        Measurements(path, "b")
    path.write_text("[]")
    with pytest.raises(ResumeError, match="holds no measurements"):
        Measurements(path, "a")
