"""Calibration data of pipelines: what their denoisers are called with, recorded, resumed and used."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, PipelineQuantizationConfig
from torch import nn

import hf_lowbit
from hf_lowbit import ConfigError
from hf_lowbit.calibration.checkpoint import ResumeError
from hf_lowbit.calibration.concatenations import find_concatenations
from hf_lowbit.calibration.data import DataError
from hf_lowbit.integrations.prompts import Prompts
from hf_lowbit.integrations.trajectories import record_trajectories
from hf_lowbit.plan import packed_modules
from hf_lowbit.state import state_of
from hf_lowbit.tensorwise import QuantizationError
from tests.integrations.tiny_pipelines import (
    dit_pipeline,
    embedded_prompt,
    flux_pipeline,
    sd3_pipeline,
    sdxl_pipeline,
    wan_pipeline,
)
from tests.matrix.models import fingerprint

ASSETS = Path(__file__).parents[1] / "assets"
TEXTS = ["a photo of a bag", "a photo of a coat", "a photo of a shirt"]
SIZE = {"height": 32, "width": 32}


def gptq(**values: Any) -> Any:
    return hf_lowbit.GPTQConfig(bits=4, group_size=32, **{"num_samples": 3, **values})


def record(pipeline: DiffusionPipeline, folder: Path, prompts: Prompts, pictures: int = 3, **options: Any) -> Any:
    names = [name for name in ("unet", "transformer") if hasattr(pipeline, name)]
    found, files = record_trajectories(pipeline, names, prompts, pictures, options.pop("seed", 0), folder, **options)
    return found[names[0]], files


@pytest.fixture(scope="module")
def stable() -> DiffusionPipeline:
    pipeline = DiffusionPipeline.from_pretrained(ASSETS / "sd-fashion", torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_a_batch_is_one_timestep_of_both_conditions(stable: DiffusionPipeline, tmp_path: Path) -> None:
    """What is recorded is what the denoiser is given, in the order of denoising."""
    given: list[dict[str, Any]] = []
    batches, _ = record(stable, tmp_path / "run", Prompts(TEXTS, steps=4, arguments=SIZE))
    handle = stable.unet.register_forward_pre_hook(
        lambda _, args, kwargs: given.append({"sample": args[0], "timestep": args[1], **kwargs}), with_kwargs=True
    )
    noise = [torch.Generator().manual_seed(seed) for seed in range(3)]
    stable(prompt=TEXTS, num_inference_steps=4, generator=noise, output_type="latent", **SIZE)
    handle.remove()
    assert len(batches) == len(given) == 4 and batches.samples == 4 * 6
    for batch, expected in zip(batches, given, strict=True):
        assert set(batch) == {"sample", "timestep", "encoder_hidden_states"}
        assert batch["timestep"].tolist() == [int(expected["timestep"])] * 6
        for name in ("sample", "encoder_hidden_states"):
            assert torch.equal(batch[name], expected[name])
    assert batches.facts["timesteps"] == [float(each["timestep"]) for each in given]
    assert batches.facts["trajectories"] == {"prompts": 3, "pictures": 3, "steps": 4, "guidance_scale": 7.5}


def test_a_picture_is_drawn_alike_whatever_it_is_drawn_with(stable: DiffusionPipeline, tmp_path: Path) -> None:
    """Prompts are taken in turn; the noise of a picture is its own; without guidance there is one condition."""
    arguments = {**SIZE, "guidance_scale": 1.0}
    many, _ = record(stable, tmp_path / "many", Prompts(TEXTS[:2], 2, arguments=arguments), pictures=9)
    assert [len(batch["timestep"]) for batch in many] == [8, 1, 8, 1] and many.samples == 18
    text = many[0]["encoder_hidden_states"]
    assert torch.equal(text[0], text[2]) and not torch.equal(text[0], text[1])
    few, _ = record(stable, tmp_path / "few", Prompts(TEXTS[:2], 2, arguments=arguments), pictures=2)
    torch.testing.assert_close(few[1]["sample"], many[2]["sample"][:2], rtol=1e-4, atol=1e-4)
    assert not torch.equal(many[0]["sample"][0], many[0]["sample"][2])


@pytest.mark.parametrize(
    ("steps", "timesteps", "expected"), [(8, 4, {0, 2, 4, 6}), (8, 3, {0, 2, 5}), (3, None, {0, 1, 2})]
)
def test_recorded_steps_are_evenly_spaced(steps: int, timesteps: int | None, expected: set[int]) -> None:
    assert Prompts(TEXTS, steps, timesteps).recorded_steps(steps) == expected
    assert len(Prompts(TEXTS, 50).recorded_steps(50)) == 25


def test_only_the_chosen_steps_are_recorded(tmp_path: Path) -> None:
    batches, _ = record(dit_pipeline(), tmp_path, Prompts([3, "5"], steps=8, timesteps=2))
    assert [set(batch["timestep"].tolist()) for batch in batches] == [{875}, {375}]
    assert batches[0]["class_labels"].tolist() == [3, 5, 3, 1000, 1000, 1000]


@pytest.mark.parametrize("heun", [False, True])
def test_nested_arguments_are_recorded(tmp_path: Path, heun: bool) -> None:
    """SDXL's, of dictionaries as prompts; a scheduler that calls the denoiser twice in a step does so here."""
    prompts = [embedded_prompt(16), embedded_prompt(16)]
    pipeline = sdxl_pipeline(heun)
    batches, _ = record(pipeline, tmp_path, Prompts(prompts, steps=3), pictures=2)
    assert len(batches.facts["timesteps"]) == 3 and len(batches) == 2 * (5 if heun else 3)
    added = batches[0]["added_cond_kwargs"]
    assert added["text_embeds"].shape == (2, 16) and added["time_ids"].shape == (2, 6)
    found = find_concatenations(pipeline.unet, batches[0])
    assert found["up_blocks.0.resnets.0.conv_shortcut"] == (64, 64)


def test_each_of_two_denoisers_has_its_own_part_of_the_steps(tmp_path: Path) -> None:
    prompt = {"prompt_embeds": torch.randn(1, 7, 32), "negative_prompt_embeds": torch.randn(1, 7, 32), "num_frames": 5}
    names = ["transformer", "transformer_2"]
    prompts = Prompts([{**prompt, "height": 32, "width": 32}], steps=6)
    found, _ = record_trajectories(wan_pipeline(), names, prompts, 1, 0, tmp_path)
    assert [len(found[name]) for name in names] == [6, 6], "conditional and unconditional calls"
    noisy, clean = (found[name].facts["timesteps"] for name in names)
    assert len(noisy) == len(clean) == 3 and min(noisy) > 500 > max(clean)


@pytest.mark.parametrize("build", [flux_pipeline, sd3_pipeline, sdxl_pipeline])
def test_structures_are_calibrated(build: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions without a batch dimension, blocks of two outputs, dictionaries: every layer but few within blocks."""
    monkeypatch.setenv("HF_LOWBIT_HOME", str(tmp_path))
    pipeline = build()
    pooled = {flux_pipeline: 32, sd3_pipeline: 64, sdxl_pipeline: 16}[build]
    prompt = embedded_prompt(pooled, negative=build is not flux_pipeline)
    config = hf_lowbit.AdaRoundConfig(bits=4, iterations=2, num_samples=1)
    hf_lowbit.quantize(pipeline, config, prompts=[prompt], steps=2)
    model = pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer
    layers = hf_lowbit.report(model).layers
    assert len(layers) == len(packed_modules(model)) > 30
    latents = pipeline(**prompt, num_inference_steps=2, output_type="latent").images
    assert bool(latents.isfinite().all())
    assert not list((tmp_path / "resume").iterdir())


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained UNet, calibrated on its own trajectories."""
    pipeline = DiffusionPipeline.from_pretrained(ASSETS / "sd-fashion", torch_dtype=torch.float32)
    folder = tmp_path_factory.mktemp("unet") / "out"
    hf_lowbit.quantize(
        pipeline, gptq(num_samples=2), output=folder, prompts=TEXTS[:2], steps=2, guidance_scale=5.0, **SIZE
    )
    pipeline.unet.register_buffer("marker", torch.zeros(1), persistent=False)
    torch.save(pipeline.unet.state_dict(), folder.parent / "live.pt")
    return folder


def test_a_calibrated_pipeline_loads_without_a_config(quantized: Path) -> None:
    loaded = DiffusionPipeline.from_pretrained(quantized, torch_dtype=torch.float32)
    live = torch.load(quantized.parent / "live.pt")
    assert all(torch.equal(live[name], tensor) for name, tensor in loaded.unet.state_dict().items())
    state = state_of(loaded.unet)
    assert state is not None
    provenance = state.config.provenance
    assert provenance["trajectories"] == {"prompts": 2, "pictures": 2, "steps": 2, "guidance_scale": 5.0}
    assert len(provenance["timesteps"]) == 2 and provenance["request"]["height"] == 32
    assert sorted(path.name for path in quantized.parent.iterdir()) == ["live.pt", "out"], "nothing is left beside it"
    assert loaded(TEXTS, num_inference_steps=2, output_type="np", **SIZE).images.shape[:3] == (3, 32, 32)


def test_calibration_beats_nearest_on_other_pictures(
    quantized: Path, stable: DiffusionPipeline, tmp_path: Path
) -> None:
    nearest = DiffusionPipeline.from_pretrained(ASSETS / "sd-fashion", torch_dtype=torch.float32)
    hf_lowbit.quantize(nearest, hf_lowbit.RTNConfig(bits=4, group_size=32))
    batches, _ = record(stable, tmp_path, Prompts(["a photo of a sandal"], 4, arguments=SIZE), 1, seed=9)
    loaded = DiffusionPipeline.from_pretrained(quantized, torch_dtype=torch.float32)

    @torch.no_grad()
    def error(model: nn.Module) -> float:
        return sum(float((model(**b).sample - stable.unet(**b).sample).square().mean()) for b in batches)

    assert error(loaded.unet) < error(nearest.unet)


def test_from_pretrained_calibrates_on_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The config's dataset is batches of the component's arguments."""
    monkeypatch.setenv("HF_LOWBIT_HOME", str(tmp_path))
    dit_pipeline().save_pretrained(tmp_path / "float")
    batches, _ = record(dit_pipeline(), tmp_path / "run", Prompts([3], steps=2), pictures=1)
    config = gptq(dataset=list(batches), num_samples=4)
    mapping = PipelineQuantizationConfig(quant_mapping={"transformer": config})
    loaded = DiffusionPipeline.from_pretrained(
        tmp_path / "float", quantization_config=mapping, torch_dtype=torch.float32
    )
    expected = dit_pipeline()
    hf_lowbit.quantize(expected.transformer, config)
    assert fingerprint(loaded.transformer) == fingerprint(expected.transformer)
    loaded.save_pretrained(tmp_path / "saved")
    again = DiffusionPipeline.from_pretrained(tmp_path / "saved", torch_dtype=torch.float32)
    assert fingerprint(again.transformer) == fingerprint(loaded.transformer)
    with pytest.raises(ConfigError, match="needs calibration data"):
        type(expected.transformer).from_pretrained(tmp_path / "float" / "transformer", quantization_config=gptq())


@pytest.mark.parametrize(
    ("prompts", "arguments", "message"),
    [
        ([], {}, "must be a list, and not empty"),
        ("a bag", {}, "must be a list"),
        (["a bag"], {}, "class labels, integers of at least 0, not 'a bag'"),
        ([True], {}, "class labels"),
        ([{"classes": [3]}], {}, "takes no argument 'classes'"),
        ([{"generator": None}], {}, "'generator' is set by the recording"),
        ([3], {"steps": 0}, "steps must be an integer of at least 1"),
        ([3], {"steps": 4, "timesteps": 5}, "timesteps=5 cannot be recorded of steps=4"),
        ([3], {"height": 8}, "DiTPipeline takes no argument 'height'"),
        ([3], {"num_inference_steps": 3}, "give steps="),
        ([3], {"components": ["unet"]}, "no component unet"),
        ([3], {"components": ["vae"]}, "does not call its component vae"),
        ([3], {"data": [{}]}, "two sources of calibration data"),
        (None, {}, "prompts=... and steps=..."),
        (None, {"steps": 3}, "give prompts as well"),
        (None, {"data": [{}], "components": ["transformer", "vae"]}, "name one of transformer, vae"),
    ],
)
def test_wrong_requests_are_refused_before_the_work(
    prompts: Any, arguments: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_LOWBIT_HOME", str(tmp_path))
    pipeline = dit_pipeline()
    with pytest.raises(ConfigError, match=message.replace("(", "\\(")):
        hf_lowbit.quantize(pipeline, gptq(), prompts=prompts, **{"steps": 1 if prompts else None, **arguments})
    assert not packed_modules(pipeline.transformer)


def test_what_is_no_pipeline_draws_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no pipeline"):
        hf_lowbit.quantize(dit_pipeline().transformer, gptq(), prompts=[3])
    dit_pipeline().transformer.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="is no pipeline"):
        hf_lowbit.quantize(tmp_path, gptq(), prompts=[3])


def test_prompts_of_a_method_without_data_are_not_drawn(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "hf_lowbit")
    pipeline = dit_pipeline()
    hf_lowbit.quantize(pipeline, hf_lowbit.RTNConfig(bits=8), prompts=[3])
    assert any("the prompts are not used" in record.message for record in caplog.records)
    with pytest.raises(QuantizationError, match="quantized already"):
        hf_lowbit.quantize(pipeline, gptq(), prompts=[3], steps=1)


def test_latents_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    """By component, argument and timestep: here the model itself returns infinity from the second step on."""
    pipeline = dit_pipeline()
    pipeline.transformer.proj_out_2.bias.data.fill_(float("inf"))
    with pytest.raises(DataError, match="transformer: hidden_states is not finite at timestep 0"):
        record(pipeline, tmp_path, Prompts([3], steps=2))


def test_another_drawing_is_not_resumed(tmp_path: Path) -> None:
    record(dit_pipeline(), tmp_path, Prompts([3], steps=2), pictures=1)
    for prompts, seed in ((Prompts([4], steps=2), 0), (Prompts([3], steps=3), 0), (Prompts([3], steps=2), 1)):
        with pytest.raises(ResumeError, match="resume=False"):
            record(dit_pipeline(), tmp_path, prompts, pictures=1, seed=seed)
    again, _ = record(dit_pipeline(), tmp_path, Prompts([4], steps=2), pictures=1, resume=False)
    assert again[0]["class_labels"][0] == 4


def test_finished_drawings_are_taken_not_drawn_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An interrupted recording goes on with the first drawing that is not complete."""
    pipeline = dit_pipeline()
    drawn: list[int] = []
    handle = pipeline.transformer.register_forward_hook(lambda *_: drawn.append(1) or _stop_after(drawn, 3))
    with pytest.raises(KeyboardInterrupt):
        record(pipeline, tmp_path / "run", Prompts([1, 2], steps=2), pictures=16)
    handle.remove()
    caplog.set_level(logging.INFO, "hf_lowbit")
    resumed, _ = record(pipeline, tmp_path / "run", Prompts([1, 2], steps=2), pictures=16)
    assert any("8 of 16 pictures are taken" in record.message for record in caplog.records)
    whole, _ = record(pipeline, tmp_path / "whole", Prompts([1, 2], steps=2), pictures=16)
    assert resumed.fingerprint == whole.fingerprint and len(resumed) == len(whole) == 4


def _stop_after(calls: list[int], most: int) -> None:
    if len(calls) == most:
        raise KeyboardInterrupt


_RUN = """
import sys, torch, hf_lowbit
torch.set_num_threads(1)
config = hf_lowbit.GPTQConfig(bits=4, group_size=32, num_samples=12)
print("ready", flush=True)
hf_lowbit.quantize(sys.argv[1], config, output=sys.argv[2], prompts=[1, 2], steps=4)
"""


def test_a_killed_calibration_ends_with_the_same_bits(tmp_path: Path) -> None:
    dit_pipeline().save_pretrained(tmp_path / "float")

    def start(output: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", _RUN, str(tmp_path / "float"), str(tmp_path / output)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        return process

    begun = time.monotonic()
    assert start("whole").wait() == 0
    whole = time.monotonic() - begun
    kept = tmp_path / ".killed.lowbit-resume"
    process = start("killed")
    while process.poll() is None and len(list(kept.glob("transformer/*.safetensors"))) < 3:
        assert time.monotonic() - begun < 20 * whole
    process.kill()
    process.wait()
    assert len(list(kept.glob("trajectories/*.safetensors"))) == 4 * 2 + 2 and not (tmp_path / "killed").exists()
    assert start("killed").wait() == 0
    results = [DiffusionPipeline.from_pretrained(tmp_path / name).transformer for name in ("whole", "killed")]
    assert fingerprint(results[0]) == fingerprint(results[1])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["float", "killed", "whole"]
    kept_config = json.loads((tmp_path / "killed/transformer/config.json").read_text())["quantization_config"]
    assert kept_config["provenance"]["trajectories"]["pictures"] == 12
    with pytest.raises(FileExistsError, match="another run"):
        hf_lowbit.quantize(
            tmp_path / "float", gptq(num_samples=12), output=tmp_path / "killed", prompts=[1, 3], steps=4
        )
