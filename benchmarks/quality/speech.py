"""Whisper's decoder: it predicts what the float model hears in recordings."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quality.task import Task

_SECONDS, _STEP = 5, 1  # of a window, and from one window's start to the next one's
_CLUSTER = 10  # windows that count as one for intervals
_CALIBRATION = "two_cities"  # 44 s; the other recordings, 38 s of other speakers, are held out


def prepare(options: argparse.Namespace, folder: Path) -> Task:
    """``samples`` windows of one recording to calibrate on, and all windows of the others with the float transcripts.

    Every window is five seconds, its ids are the float model's greedy ones, and every layer of the encoder stays float.
    What is quantized is a float32 copy of the model: processors without float16 units take four times as long in that.
    """
    from transformers import WhisperProcessor
    from transformers.modeling_outputs import BaseModelOutput

    from hf_lowbit.evaluation.audio import read_wav
    from hf_lowbit.testbed import speech, whisper_tiny_en

    source = options.model or whisper_tiny_en()
    waves = {path.stem: _windows(read_wav(path)) for path in speech()}
    calibration = waves.pop(_CALIBRATION)
    if len(calibration) < options.samples:
        raise SystemExit(f"{_CALIBRATION} holds {len(calibration)} windows, not {options.samples}")
    chosen = np.linspace(0, len(calibration) - 1, options.samples).round().astype(int)
    path = folder / "calibration.pt"
    torch.save([torch.from_numpy(calibration[i]) for i in chosen], path)

    model, processor = _load(source).eval(), WhisperProcessor.from_pretrained(source)
    copy = folder / source.name
    model.save_pretrained(copy)
    processor.save_pretrained(copy)
    heard: dict[tuple[int, ...], Tensor] = {}  # what the encoder, the same in every variant, makes of the window
    for wave in (wave for windows in waves.values() for wave in windows):
        features = processor(wave, sampling_rate=16_000, return_tensors="pt").input_features
        ids = _listen(model, features)
        if ids not in heard:
            with torch.no_grad():
                heard[ids] = model.get_encoder()(features).last_hidden_state
    windows = [torch.tensor(ids) for ids in heard]

    def read(model: Any) -> Callable[[Tensor], Tensor]:
        def logits(ids: Tensor) -> Tensor:
            encoded = BaseModelOutput(last_hidden_state=heard[tuple(ids[0].tolist())].to(model.device))
            found: Tensor = model(encoder_outputs=encoded, decoder_input_ids=ids.to(model.device)).logits
            return found

        return logits

    clusters = [number // _CLUSTER for number in range(len(windows))]
    return Task(copy, path, windows, _load, read, clusters, {"modules_to_not_convert": ["model.encoder"]})


def _windows(wave: np.ndarray) -> list[np.ndarray]:
    size, step = _SECONDS * 16_000, _STEP * 16_000
    return [wave[start : start + size] for start in range(0, len(wave) - size + 1, step)]


def _listen(model: Any, features: Tensor) -> tuple[int, ...]:
    with torch.no_grad():
        ids = model.generate(
            features, do_sample=False, num_beams=1, return_dict_in_generate=True, force_unique_generate_call=True
        ).sequences[0]
    return tuple(ids.tolist())


def _load(folder: Path) -> Any:
    from transformers import AutoModelForSpeechSeq2Seq

    return AutoModelForSpeechSeq2Seq.from_pretrained(folder, dtype=torch.float32)
