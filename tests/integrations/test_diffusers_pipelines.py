"""Whole pipelines: two small trained ones draw the same pictures with 8-bit weights, and still draw with 4 bits."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, PipelineQuantizationConfig
from diffusers.utils import logging as diffusers_logging
from torch import nn

from hf_lowbit import RTNConfig
from hf_lowbit.plan import packed_modules
from hf_lowbit.state import state_of

ASSETS = Path(__file__).parents[1] / "assets"
DENOISERS = {"sd-fashion": "unet", "dit-fashion": "transformer"}
W4 = {"bits": 4, "group_size": 32}
W8 = {"bits": 8, "group_size": None}
STEPS = 5
diffusers_logging.disable_progress_bar()


def load(folder: Path, config: PipelineQuantizationConfig | None = None, **arguments: Any) -> DiffusionPipeline:
    # The files are float16, in which the components of transformers would stay.
    pipeline = DiffusionPipeline.from_pretrained(
        folder, quantization_config=config, torch_dtype=torch.float32, **arguments
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def quantized(name: str, values: dict[str, Any], *components: str) -> DiffusionPipeline:
    chosen = components or (DENOISERS[name],)
    mapping = {component: RTNConfig(**values) for component in chosen}
    return load(ASSETS / name, PipelineQuantizationConfig(quant_mapping=mapping))


def draw(pipeline: DiffusionPipeline) -> np.ndarray:
    """Four pictures ``[4, 32, 32]`` in 0..1 from a fixed seed."""
    what: dict[str, Any] = {"class_labels": [0, 1, 7, 9]}
    if hasattr(pipeline, "unet"):
        names = ("an ankle boot", "a t-shirt", "a sneaker", "a bag")
        what = {"prompt": [f"a photo of {name}" for name in names], "height": 32, "width": 32}
    generator = torch.Generator().manual_seed(0)
    images = pipeline(**what, num_inference_steps=STEPS, generator=generator, output_type="np").images
    return np.asarray(images).reshape(4, 32, 32)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(-10 * np.log10(np.mean((a - b) ** 2)))


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Mean structural similarity with windows of 7 x 7."""

    def mean(x: torch.Tensor) -> torch.Tensor:
        return nn.functional.avg_pool2d(x, 7, 1)

    x, y = (torch.tensor(images, dtype=torch.float64)[:, None] for images in (a, b))
    mx, my = mean(x), mean(y)
    vx, vy, covariance = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
    numerator = (2 * mx * my + 1e-4) * (2 * covariance + 9e-4)
    return float((numerator / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4))).mean())


def assert_same_component(a: nn.Module, b: nn.Module) -> None:
    left, right = a.state_dict(), b.state_dict()
    assert left.keys() == right.keys()
    assert all(left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left)


@pytest.fixture(scope="module")
def pictures() -> dict[str, np.ndarray]:
    """What the float pipelines draw."""
    return {name: draw(load(ASSETS / name)) for name in DENOISERS}


# Measured against the float pictures of the same seed, 5 steps, both pipelines: 8-bit weights 47.9 and 48.3 dB and
# SSIM 0.9997; with 8-bit activations 36.1 and 38.0 dB and 0.992 and 0.996; 4 bits 24.3 and 21.7 dB, 0.915 and 0.910.
# Another seed of the float model: 14.5 and 17.6 dB, 0.60 and 0.80.
@pytest.mark.parametrize("name", DENOISERS)
@pytest.mark.parametrize(
    ("values", "decibels", "similarity"),
    [(W8, 42, 0.998), ({**W8, "activation_bits": 8}, 32, 0.98), (W4, 19, 0.87)],
    ids=["W8", "W8A8", "W4"],
)
def test_pictures(
    pictures: dict[str, np.ndarray], name: str, values: dict[str, Any], decibels: float, similarity: float
) -> None:
    drawn = draw(quantized(name, values))
    assert psnr(pictures[name], drawn) > decibels and ssim(pictures[name], drawn) > similarity


def test_both_forms_of_the_pipeline_config_agree(tmp_path: Path) -> None:
    config = RTNConfig(**W4)
    by_name = load(
        ASSETS / "sd-fashion", PipelineQuantizationConfig(quant_mapping={"unet": config, "text_encoder": config})
    )
    assert config.plan is None  # neither component wrote its plan into the user's config
    by_backend = load(
        ASSETS / "sd-fashion",
        PipelineQuantizationConfig(
            quant_backend="lowbit_rtn", quant_kwargs=W4, components_to_quantize=["unet", "text_encoder"]
        ),
    )
    assert state_of(by_name.vae) is None
    for component in ("unet", "text_encoder"):
        assert_same_component(getattr(by_name, component), getattr(by_backend, component))
        assert state_of(getattr(by_name, component)).report.layers


def test_without_components_every_model_is_quantized(tmp_path: Path) -> None:
    config = PipelineQuantizationConfig(quant_backend="lowbit_rtn", quant_kwargs=W8)
    pipeline = load(ASSETS / "sd-fashion", config)
    for component in ("unet", "vae", "text_encoder"):
        assert packed_modules(getattr(pipeline, component))
    pipeline.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    for component in ("unet", "vae", "text_encoder"):
        assert_same_component(getattr(pipeline, component), getattr(loaded, component))


def test_components_save_themselves(tmp_path: Path) -> None:
    """The pipeline calls each component's own method, and passes on the arguments that its signature names."""
    pipeline = quantized("sd-fashion", W4, "unet", "text_encoder")
    pipeline.save_pretrained(tmp_path, max_shard_size="200KB", variant="w4")
    for component in ("unet", "text_encoder"):
        folder = tmp_path / component
        names = [path.name for path in folder.iterdir()]
        assert {"config.json", "lowbit_report.json", "README.md"} <= set(names)
        assert len([name for name in names if ".w4" in name and "-of-" in name]) > 1
        stored = json.loads((folder / "config.json").read_text())["quantization_config"]
        assert stored["quant_method"] == "lowbit_rtn" and stored["plan"]
    assert not (tmp_path / "vae" / "lowbit_report.json").exists()
    loaded = load(tmp_path, variant="w4")
    for component in ("unet", "text_encoder", "vae"):
        assert_same_component(getattr(pipeline, component), getattr(loaded, component))
    assert np.array_equal(draw(pipeline), draw(loaded))


@pytest.mark.parametrize("name", DENOISERS)
def test_reload_draws_the_same_pictures(name: str, tmp_path: Path) -> None:
    pipeline = quantized(name, W4)
    pipeline.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert_same_component(getattr(pipeline, DENOISERS[name]), getattr(loaded, DENOISERS[name]))
    assert np.array_equal(draw(pipeline), draw(loaded.to("cpu")))


def test_reload_in_a_fresh_process(tmp_path: Path) -> None:
    pipeline = quantized("dit-fashion", W4)
    pipeline.save_pretrained(tmp_path / "q")
    script = (
        "import sys, numpy, torch, hf_lowbit; torch.set_num_threads(1)\n"
        "from pathlib import Path; from tests.integrations.test_diffusers_pipelines import draw, load\n"
        "numpy.save(sys.argv[2], draw(load(Path(sys.argv[1]))))"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "q"), str(tmp_path / "drawn.npy")], check=True)
    np.testing.assert_allclose(np.load(tmp_path / "drawn.npy"), draw(pipeline), atol=1e-3)


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="has no field bitz"):
        load(
            ASSETS / "dit-fashion",
            PipelineQuantizationConfig(
                quant_backend="lowbit_rtn", quant_kwargs={"bitz": 4}, components_to_quantize=["transformer"]
            ),
        )
    with pytest.raises(ValueError, match="quant_backend=lowbit_nothing was not found"):
        PipelineQuantizationConfig(quant_backend="lowbit_nothing", quant_kwargs=W4)
