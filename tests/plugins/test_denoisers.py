"""Methods on trained denoisers: how near their outputs come on other trajectories, and pipelines that draw the same.

Signal to noise of the denoiser's output in dB, measured with these settings (limits below are some dB lower):

              rtn W4A4   svdquant W4A4   rtn W4A16   adaround W4A16
  sd-fashion       7.9            18.6        16.0             21.2
  dit-fashion      7.7            21.9        23.0             27.9
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hf_lowbit import AdaRoundConfig, LowRankConfig, QDiffusionConfig, RTNConfig, SVDQuantConfig, ViDiTQConfig
from hf_lowbit.config import LowbitConfig
from hf_lowbit.plan import packed_modules
from tests.integrations.test_diffusers_pipelines import draw, load
from tests.matrix.models import fingerprint
from tests.plugins.denoisers import ASSETS, DENOISERS, quantized, signal_to_noise

RTN_W4A4 = {"bits": 4, "group_size": 64, "activation_bits": 4, "activation_group_size": 64}
SVDQUANT: dict[str, Any] = {"low_rank": LowRankConfig(rank=16), "smooth_steps": 4, "iterations": 3}
SHORT: dict[str, LowbitConfig] = {
    "svdquant": SVDQuantConfig(low_rank=LowRankConfig(rank=8), smooth_steps=1, iterations=1),
    "adaround": AdaRoundConfig(bits=4, iterations=2),
    "q_diffusion": QDiffusionConfig(iterations=2),
    "vidit_q": ViDiTQConfig(bits=4),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", DENOISERS)
def test_svdquant_comes_nearer_than_rounding_at_four_and_four_bits(name: str) -> None:
    rtn, svdquant = (
        signal_to_noise(name, quantized(name, c)) for c in (RTNConfig(**RTN_W4A4), SVDQuantConfig(**SVDQUANT))
    )
    assert svdquant > rtn + 6 and svdquant > 14


@pytest.mark.slow
@pytest.mark.parametrize("name", DENOISERS)
def test_learned_rounding_comes_nearer_than_nearest(name: str) -> None:
    nearest = signal_to_noise(name, quantized(name, RTNConfig(bits=4, symmetric=False)))
    learned = signal_to_noise(name, quantized(name, AdaRoundConfig(bits=4, iterations=60)))
    assert learned > nearest + 2 and learned > 18


@pytest.mark.slow
def test_q_diffusion_on_the_unet() -> None:
    """8-bit weights lose little, 4-bit ones less when their roundings are learned."""
    found = {
        label: signal_to_noise("sd-fashion", quantized("sd-fashion", config))
        for label, config in {
            "eight": QDiffusionConfig(bits=8, iterations=0),
            "nearest": QDiffusionConfig(bits=4, iterations=0),
            "learned": QDiffusionConfig(bits=4, iterations=60),
        }.items()
    }
    assert found["eight"] > found["learned"] > found["nearest"] + 1, found


# 5 of vidit_q
@pytest.mark.slow
def test_vidit_q_on_the_transformer() -> None:
    """W8A8 is next to the float model; balancing helps W4A8; stored scales of 8 bits lose more than tokens'."""
    static = {"activation_symmetric": False, "activation_static": True}
    configs: dict[str, LowbitConfig] = {
        "W8A8": ViDiTQConfig(),
        "W4A8": ViDiTQConfig(bits=4),
        "W4A8 unbalanced": ViDiTQConfig(bits=4, balance=False),
        "static": RTNConfig(bits=8, symmetric=False, activation_bits=8, **static),
    }
    found = {label: signal_to_noise("dit-fashion", quantized("dit-fashion", c)) for label, c in configs.items()}
    assert found["W8A8"] > found["W4A8"] > found["W4A8 unbalanced"] and found["W8A8"] > found["static"] + 6, found


@pytest.mark.parametrize("method_name", SHORT)
@pytest.mark.parametrize("name", ["dit-fashion", pytest.param("sd-fashion", marks=pytest.mark.slow)])
def test_a_pipeline_saves_and_draws_the_same_again(name: str, method_name: str, tmp_path: Path) -> None:
    pipeline = load(ASSETS / name)
    setattr(pipeline, DENOISERS[name], quantized(name, SHORT[method_name], steps=2, samples=2))
    pipeline.save_pretrained(tmp_path)
    reloaded: Any = load(tmp_path)
    own, again = (getattr(p, DENOISERS[name]) for p in (pipeline, reloaded))
    assert packed_modules(again) and fingerprint(again) == fingerprint(own)
    difference = np.abs(draw(reloaded) - draw(pipeline)).max()
    # float layers may be multiplied in another order where their weights lie elsewhere in memory
    assert difference == 0 if method_name != "vidit_q" else difference < 0.01
