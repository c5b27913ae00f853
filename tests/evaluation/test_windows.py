"""Windows: every token once, BOS first, nothing that predicts nothing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_lowbit.evaluation import split_windows
from hf_lowbit.evaluation.windows import predicted_tokens


@given(
    count=st.integers(0, 60), sequence_length=st.integers(2, 20), bos=st.sampled_from([None, 99])
)  # fmt: skip
@settings(deadline=None, max_examples=60)
def test_windows_hold_the_text_in_order(count: int, sequence_length: int, bos: int | None) -> None:
    windows = split_windows(range(count), sequence_length, bos)

    prefix = 0 if bos is None else 1
    text = [token for window in windows for token in window.tolist()[prefix:]]
    left_out = count - len(text)
    assert text == list(range(len(text)))
    assert left_out == (1 if bos is None and count % sequence_length == 1 else 0)
    assert all(2 <= window.numel() <= sequence_length for window in windows)
    assert all(window.numel() == sequence_length for window in windows[:-1])
    assert bos is None or all(window[0] == bos for window in windows)


def test_windows_are_token_ids_and_weigh_what_they_predict() -> None:
    windows = split_windows([5, 6, 7, 8, 9], 3)
    assert [window.tolist() for window in windows] == [[5, 6, 7], [8, 9]]
    assert all(window.dtype == torch.int64 for window in windows)
    assert predicted_tokens(windows) == [2, 1]


def test_a_last_single_token_counts_only_after_bos() -> None:
    assert len(split_windows([1, 2, 3, 4], 3)) == 1
    assert [window.tolist() for window in split_windows([1, 2, 3], 3, 0)] == [[0, 1, 2], [0, 3]]


def test_a_window_of_one_token_is_refused() -> None:
    with pytest.raises(ValueError, match="sequence_length is 1"):
        split_windows([1, 2, 3], 1)
