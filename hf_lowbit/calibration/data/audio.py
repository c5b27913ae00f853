"""Recordings for a speech model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hf_lowbit.calibration.data.limits import check_ids, decoder_positions
from hf_lowbit.calibration.data.request import Request
from hf_lowbit.calibration.data.result import Batch, CalibrationData, DataError, to_result
from hf_lowbit.calibration.data.running import dropout_off
from hf_lowbit.calibration.data.tokenizer import load_processor

_ASSUMED_RATE = 16_000  # of an array that comes without one


@dataclass(frozen=True)
class Recording:
    """A mono waveform, float32 [samples], and its transcript if it is known."""

    waveform: NDArray[np.float32]
    rate: int
    text: str | None


def from_recordings(recordings: Sequence[Any], request: Request, description: str) -> CalibrationData:
    """One batch for each of ``num_samples`` recordings, drawn by the seed: features as the model's feature extractor
    makes them (float32; it cuts what is longer than its window, 30 s for Whisper).

    For a model with a decoder "decoder_input_ids" come with them: the recording's "text" if it has one, else what the
    model itself hears (greedy search); with the tokens that begin a transcript, without the one that ends it, at most
    ``sequence_length`` of them. Batches are of one recording, so that nothing is padded.

    Args:
        recordings: each an array [samples] at 16 kHz, a dict {"array", "sampling_rate"[, "text"]}, or a dict with
            such an array or dict as "audio" (a row of a speech dataset).

    Raises:
        DataError: no speech model, no processor or another model's, too few recordings, another sampling rate, a
            recording that is empty, not mono or not finite.
    """
    chosen = request.choose(len(recordings), "recordings")
    read = {index: read_recording(recordings[index], f"recording {index}") for index in chosen}
    processor = load_processor(request.tokenizer_source)
    extractor = _checked_extractor(processor, request.model)
    for index, recording in read.items():
        if recording.rate != extractor.sampling_rate:
            raise DataError(
                f"recording {index} has {recording.rate} Hz, the model takes {extractor.sampling_rate} Hz: resample it"
            )
    batches = [_to_batch(recording, processor, request) for recording in read.values()]
    first = batches[0].get("decoder_input_ids")
    return to_result(batches, description, None if first is None else processor.tokenizer.decode(first[0].tolist()))


def read_recording(item: Any, name: str) -> Recording:
    """One recording out of any form that it may come in.

    Raises:
        DataError: it is none, or its decoder is not installed.
    """
    text = item.get("text") if isinstance(item, Mapping) else None
    if isinstance(item, Mapping) and "audio" in item:
        item = item["audio"]
    rate: Any = _ASSUMED_RATE
    if not isinstance(item, Tensor | np.ndarray):
        try:
            item, rate = item["array"], item["sampling_rate"]
        except ImportError as error:
            raise DataError(f"{name} cannot be decoded: {error}") from error
        except (KeyError, TypeError, IndexError):
            raise DataError(f"{name} must be an array of samples, or a dict with 'array' and 'sampling_rate'") from None
    waveform = np.asarray(item.detach().cpu().float() if isinstance(item, Tensor) else item)
    if waveform.ndim != 1 or waveform.size == 0 or waveform.dtype.kind != "f":
        raise DataError(
            f"{name} is {waveform.dtype} {list(waveform.shape)}; it must be mono floating point samples [samples]"
        )
    if text is not None and not isinstance(text, str):
        raise DataError(f"{name}: its text is a {type(text).__name__}; it must be a string")
    if not np.isfinite(waveform).all():
        raise DataError(f"{name} holds NaN or infinite samples")
    return Recording(waveform.astype(np.float32), int(rate), text)


def _checked_extractor(processor: Any, model: Any) -> Any:
    extractor = getattr(processor, "feature_extractor", None)
    main = getattr(model, "main_input_name", None)
    if main not in ("input_features", "input_values"):
        raise DataError(
            f"recordings calibrate speech models, and {type(model).__name__} takes {main or 'no recordings'}"
        )
    if extractor is None:
        raise DataError("recordings need the model's processor with its feature extractor, not a tokenizer alone")
    bins = getattr(model.config, "num_mel_bins", None)
    size = getattr(extractor, "feature_size", bins)
    if main not in extractor.model_input_names or (main == "input_features" and bins is not None and size != bins):
        raise DataError(
            f"the feature extractor makes {extractor.model_input_names[0]} of {size} values and the model takes {main} "
            f"of {bins}: it is a processor of another model"
        )
    return extractor


def _to_batch(recording: Recording, processor: Any, request: Request) -> Batch:
    model, extractor = request.model, processor.feature_extractor
    inputs = extractor(recording.waveform, sampling_rate=recording.rate, return_tensors="pt")
    features = inputs[model.main_input_name].to(torch.float32)
    batch = {model.main_input_name: features}
    if not model.config.is_encoder_decoder:
        return batch
    if recording.text is None:
        ids = _listen(model, features)
    else:
        ids = _begin(model, processor.tokenizer(recording.text)["input_ids"])
    if len(ids) > 1 and ids[-1] in _as_list(model.generation_config.eos_token_id):
        ids = ids[:-1]  # the decoder predicts the end, and never reads it
    kept = ids[: min(request.sequence_length, decoder_positions(model) or len(ids))]
    check_ids(torch.tensor(kept), model, "decoder_input_ids")
    return {**batch, "decoder_input_ids": torch.tensor([kept])}


def _listen(model: Any, features: Tensor) -> list[int]:
    """The greedy transcript of features [1, ...], with the tokens that begin it."""
    # Whisper's own generate strips them, unless it is held to a single pass; a window is one pass anyway.
    single = {"force_unique_generate_call": True} if model.config.model_type == "whisper" else {}
    with dropout_off(model):
        output = model.generate(
            features.to(model.device, model.dtype), do_sample=False, num_beams=1, return_dict_in_generate=True, **single
        )
    ids: list[int] = output.sequences[0].tolist()
    return ids


def _begin(model: Any, ids: list[int]) -> list[int]:
    """The ids with the token that every transcript of this model begins with."""
    start = model.generation_config.decoder_start_token_id
    return ids if start is None or ids[:1] == [start] else [start, *ids]


def _as_list(value: int | list[int] | None) -> list[int]:
    return value if isinstance(value, list) else [] if value is None else [value]
