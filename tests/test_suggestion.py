"""Tests of the answers to wrong names."""

from __future__ import annotations

import pytest

from hf_lowbit.suggestion import suggest, unknown


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("bit", "did you mean 'bits'?"),
        ("group_siz", "did you mean 'group_size'?"),
        ("colour", "known: bits, group_size"),
        (7, "known: bits, group_size"),
    ],
)
def test_names_the_closest_or_all(name: object, answer: str) -> None:
    assert suggest(name, (n for n in ("bits", "group_size"))) == answer


def test_says_what_kind_of_name_it_is() -> None:
    assert unknown("metric", "k", {"kl": 1, "output": 2}) == "unknown metric 'k'; did you mean 'kl'?"
    assert unknown("method", "x", ["rtn"], "installed") == "unknown method 'x'; installed: rtn"
