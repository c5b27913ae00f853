"""Recordings as 16 kHz mono arrays, in pieces that a speech model takes."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

SAMPLE_RATE = 16_000
WINDOW_SECONDS = 30.0

Waveform = NDArray[np.float32]


def read_wav(path: str | Path, sample_rate: int = SAMPLE_RATE) -> Waveform:
    """Read an uncompressed WAV file as mono samples in [-1, 1] at ``sample_rate`` Hz.

    Returns:
        float32 [samples].

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not a WAV file, or an encoding that is not PCM or float.
    """
    from scipy.io import wavfile
    from scipy.signal import resample_poly

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", wavfile.WavFileWarning)  # chunks that hold no samples, such as titles
        rate, samples = wavfile.read(path)
    waveform = _to_float(samples)
    if waveform.ndim == 2:
        waveform = waveform.mean(axis=1)
    if rate != sample_rate:
        common = math.gcd(rate, sample_rate)
        waveform = resample_poly(waveform, sample_rate // common, rate // common)
    return waveform.astype(np.float32)


def split_speech(
    waveform: Waveform, sample_rate: int = SAMPLE_RATE, max_seconds: float = WINDOW_SECONDS
) -> list[Waveform]:
    """Cut a waveform into pieces of at most ``max_seconds``, each at the quietest moment of the last sixth it may have.

    Returns:
        Views that follow each other without gap or overlap; one if the waveform is short enough.

    Raises:
        ValueError: the waveform is empty.
    """
    if waveform.size == 0:
        raise ValueError("the recording is empty")
    longest = int(max_seconds * sample_rate)
    pieces = []
    while waveform.size > longest:
        cut = longest - longest // 6 + _quietest(waveform[longest - longest // 6 : longest], sample_rate // 10)
        pieces.append(waveform[:cut])
        waveform = waveform[cut:]
    return [*pieces, waveform]


def _quietest(waveform: Waveform, span: int) -> int:
    """The middle of the ``span`` samples with the least energy."""
    energy = np.concatenate([[0.0], np.cumsum(waveform.astype(np.float64) ** 2)])
    return int(np.argmin(energy[span:] - energy[:-span])) + span // 2


def _to_float(samples: NDArray[np.generic]) -> NDArray[np.float64]:
    """PCM samples scaled to [-1, 1]; SciPy gives 8 bits unsigned, and 24 bits as the upper bits of 32."""
    if samples.dtype == np.uint8:
        return (samples.astype(np.float64) - 128) / 128
    if samples.dtype.kind == "i":
        return samples.astype(np.float64) / 2.0 ** (8 * samples.dtype.itemsize - 1)
    return samples.astype(np.float64)
