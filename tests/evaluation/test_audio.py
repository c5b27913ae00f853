"""Reading WAV files and cutting waveforms."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.io import wavfile

from hf_lowbit.evaluation import read_wav, split_speech


def tone(rate: int, seconds: float = 0.5) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * 440 * np.arange(int(rate * seconds)) / rate)


@pytest.mark.parametrize("rate", [8_000, 16_000, 24_000, 44_100, 48_000])
def test_any_rate_becomes_16_khz(tmp_path: Path, rate: int) -> None:
    wavfile.write(tmp_path / "tone.wav", rate, (tone(rate) * 32767).astype(np.int16))
    waveform = read_wav(tmp_path / "tone.wav")
    assert waveform.dtype == np.float32
    assert waveform.shape == (8_000,)
    np.testing.assert_allclose(waveform[500:-500], tone(16_000)[500:-500], atol=5e-3)


@pytest.mark.parametrize(
    ("encode", "tolerance"),
    [
        (lambda x: (x * 127 + 128).astype(np.uint8), 2e-2),
        (lambda x: (x * 32767).astype(np.int16), 1e-4),
        (lambda x: (x * (2**31 - 1)).astype(np.int32), 1e-6),
        (lambda x: x.astype(np.float32), 1e-6),
        (lambda x: np.stack([2 * x, 0 * x], axis=1).astype(np.float32), 1e-6),
    ],
    ids=["8 bit", "16 bit", "32 bit", "float", "stereo"],
)
def test_any_encoding_is_scaled_to_one(tmp_path: Path, encode, tolerance: float) -> None:
    wavfile.write(tmp_path / "tone.wav", 16_000, encode(tone(16_000)))
    np.testing.assert_allclose(read_wav(tmp_path / "tone.wav"), tone(16_000), atol=tolerance)


def test_what_is_no_wav_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.wav").write_bytes(b"not a recording")
    with pytest.raises(ValueError, match="not understood"):
        read_wav(tmp_path / "text.wav")


def test_pieces_are_cut_in_silence_and_lose_nothing() -> None:
    waveform = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    waveform[260:300] *= 1e-3
    pieces = split_speech(waveform, sample_rate=100, max_seconds=3.0)
    np.testing.assert_array_equal(np.concatenate(pieces), waveform)
    assert all(0 < piece.size <= 300 for piece in pieces)
    assert 260 <= pieces[0].size < 300


def test_a_short_waveform_is_one_piece_and_an_empty_one_an_error() -> None:
    (piece,) = split_speech(np.zeros(480_000, dtype=np.float32))
    assert piece.size == 480_000
    with pytest.raises(ValueError, match="empty"):
        split_speech(np.zeros(0, dtype=np.float32))
