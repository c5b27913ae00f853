"""Whisper tiny.en on one recording, float and packed."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import WhisperForConditionalGeneration, WhisperProcessor

from whole_models.workers.native import native_library
from whole_models.workers.protocol import Job, memory, serve, size_mb, timed

RECORDING = 1  # 28 s: one window of the model


def prepare(job: Job) -> None:
    """options: config of RTNConfig, absent for float32."""
    values: dict[str, Any] = {}
    if "config" in job.options:
        from hf_lowbit import RTNConfig

        values["quantization_config"] = RTNConfig(**job.options["config"])
    model = WhisperForConditionalGeneration.from_pretrained(job.source, dtype=torch.float32, **values)
    model.save_pretrained(job.folder)
    WhisperProcessor.from_pretrained(job.source).save_pretrained(job.folder)


def measure(job: Job) -> dict[str, Any]:
    """Seconds, and the real-time factor: transcription time per time of the recording (second run)."""
    from hf_lowbit.evaluation.audio import SAMPLE_RATE, read_wav
    from hf_lowbit.evaluation.transcription import transcribe
    from hf_lowbit.testbed import speech

    torch.set_num_threads(job.threads)
    result: dict[str, Any] = memory("imported")
    with timed(result, "load_s"):
        model = WhisperForConditionalGeneration.from_pretrained(job.folder, dtype=torch.float32)
    result.update(memory("loaded"))
    processor = WhisperProcessor.from_pretrained(job.folder)
    recording = read_wav(speech()[RECORDING])
    for _ in range(2):
        begun = time.perf_counter()
        text = transcribe(model, processor, recording)
        seconds = time.perf_counter() - begun
    duration = len(recording) / SAMPLE_RATE
    result.update(transcription_s=seconds, recording_s=duration, real_time_factor=seconds / duration)
    result["text_tokens"] = len(processor.tokenizer(text).input_ids)
    if "config" in job.options:
        result["native_library"] = native_library()
    return {**result, **memory("transcribed"), "disk_mb": size_mb(job.folder)}


if __name__ == "__main__":
    serve(prepare, measure)
