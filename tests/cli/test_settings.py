"""From texts on the command line to values, and from errors to exit codes."""

from __future__ import annotations

from typing import Any

import pytest

from hf_lowbit.cli.console import size
from hf_lowbit.cli.errors import exit_code, one_line
from hf_lowbit.cli.settings import assign, parse_value


@pytest.mark.parametrize(
    ("text", "value"),
    [("3", 3), ("0.5", 0.5), ("true", True), ("False", False), ("None", None), ("nf", "nf"), ("[1, 2]", [1, 2])],
)
def test_values(text: str, value: Any) -> None:
    assert parse_value(text) == value and type(parse_value(text)) is type(value)


def test_nested_fields() -> None:
    values: dict[str, Any] = {"low_rank": {"rank": 8}}
    for assignment in ("low_rank.keep=branch", "overrides.model.layers.0.bits=8", 'overrides={"lm_head": {"bits": 8}}'):
        assign(values, assignment)
    assert values == {"low_rank": {"rank": 8, "keep": "branch"}, "overrides": {"lm_head": {"bits": 8}}}
    assign(values, "overrides.model.layers.0.bits=4")
    assert values["overrides"] == {"lm_head": {"bits": 8}, "model.layers.0": {"bits": 4}}


def test_exit_codes() -> None:
    from hf_lowbit.config import ConfigError
    from hf_lowbit.tensorwise import QuantizationError

    assert [exit_code(error) for error in (ConfigError("x"), FileExistsError("x"), OSError("no such repository"))] == [
        2
    ] * 3
    assert [exit_code(error) for error in (QuantizationError("x"), OSError(28, "full"), RuntimeError("x"))] == [1] * 3
    assert one_line(ConfigError("two\n  lines")) == "two lines"
    assert one_line(KeyError("name")).startswith("KeyError: ") and "--debug" in one_line(KeyError("name"))


def test_sizes() -> None:
    assert [size(n) for n in (12, 1500, 56_400_000, 269e6, 3.2e9)] == [
        "12 bytes",
        "1.5 kB",
        "56.4 MB",
        "269 MB",
        "3.2 GB",
    ]
