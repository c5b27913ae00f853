"""Names and regular expressions that select modules."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_lowbit.plan.patterns import check_patterns, expand, first_match, generalisations, generalise, matches

segments = st.one_of(st.integers(0, 30).map(str), st.sampled_from(["model", "layers", "q_proj", "mlp", "to_out"]))
names = st.lists(segments, min_size=1, max_size=5).map(".".join)


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("lm_head", "lm_head", True),
        ("lm_head", "model.lm_head", True),
        ("layers.0", "model.layers.0.mlp", True),
        ("layers.0", "model.layers.01.mlp", False),
        ("layers.0", "model.layers.10", False),
        ("proj", "model.q_proj", False),
        (r".*\.q_proj", "model.layers.3.q_proj", True),
        (r".*\.q_proj", "model.layers.3.q_proj.inner", False),
        (r"model\.layers\.[0-3]\..*", "model.layers.2.mlp.up_proj", True),
        (r"model\.layers\.[0-3]\..*", "model.layers.12.mlp.up_proj", False),
        ("down|up", "up", True),
        ("", "model", False),
    ],
)
def test_matches(pattern: str, name: str, expected: bool) -> None:
    assert matches(pattern, name) is expected


def test_first_match_counts() -> None:
    assert first_match(["v_proj", r".*proj", "q_proj"], "layers.0.q_proj") == r".*proj"
    assert first_match(["v_proj"], "layers.0.q_proj") is None


@pytest.mark.parametrize(
    ("pattern", "message"), [("[", "not a valid regular"), ("*", "not a valid"), ("", "expected"), (3, "not 3")]
)
def test_impossible_patterns_are_refused(pattern: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_patterns(["fine", pattern])


def test_generalise_replaces_list_indices_only() -> None:
    assert generalise("model.layers.12.conv1d.0.w2") == "model.layers.*.conv1d.*.w2"


def test_generalisations_go_from_wide_to_narrow() -> None:
    assert generalisations("blocks.3.to_out.0") == ["blocks.*.to_out.*", "blocks.*.to_out.0"]


@settings(deadline=None, derandomize=True)
@given(st.lists(names, min_size=1, max_size=12, unique=True))
def test_every_name_answers_to_its_generalisations_and_to_itself(all_names: list[str]) -> None:
    for name in all_names:
        assert all(name in expand(pattern, all_names) for pattern in generalisations(name))
        assert expand(name, all_names) == [name]


def test_expand_takes_nothing_but_indices() -> None:
    assert expand(
        "layers.*.q", ["layers.0.q", "layers.10.q", "layers.x.q", "layers.0.k", "a.layers.0.q", "layersz0.q"]
    ) == [
        "layers.0.q",
        "layers.10.q",
    ]
