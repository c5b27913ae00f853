"""From options and ``--set field=value`` to a method's config. The config class itself checks names and values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_lowbit.cli.errors import RequestError

if TYPE_CHECKING:
    from hf_lowbit.config import LowbitConfig

_WORDS = {"true": True, "True": True, "false": False, "False": False, "none": None, "None": None, "null": None}
_NOT_SETTABLE = {
    "dataset": "is given by --data",
    "plan": "is made by quantization",
    "provenance": "is made by quantization",
}


def build_config(
    method: str | None, stored: Path | None, options: dict[str, Any], assignments: list[str]
) -> LowbitConfig:
    """The config of a command line.

    Args:
        method: its name; may be left out where the file names it.
        stored: a JSON file with fields, for example a ``config.json``'s quantization_config; the rest overrides it.
        options: fields given as options of their own; None is "not given".
        assignments: ``field=value`` texts.

    Raises:
        ConfigError, RequestError: an unknown method or field, or a value that cannot be.
    """
    from hf_lowbit.method import method_named

    values = read_fields(stored) if stored is not None else {}
    name = method or str(values.get("quant_method", "")).removeprefix("lowbit_")
    if not name:
        raise RequestError("no method is named: add --method NAME (hf-lowbit methods lists them)")
    chosen = method_named(name)
    values.update({field: value for field, value in options.items() if value is not None})
    for assignment in assignments:
        assign(values, assignment)
    if "group_size" in values:
        values["group_size"] = parse_group(values["group_size"])
    config: LowbitConfig = chosen.config_class.from_dict(values)
    return config


def read_fields(path: Path) -> dict[str, Any]:
    """Fields of a config file, without what an earlier quantization added."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise RequestError(f"{path} is not JSON: {error}") from None
    if isinstance(values, dict):
        values = values.get("quantization_config", values)
    if not isinstance(values, dict):
        raise RequestError(f"{path} holds no fields: a JSON object is needed")
    return {name: value for name, value in values.items() if name not in ("plan", "provenance")}


def assign(values: dict[str, Any], assignment: str) -> None:
    """Add one ``field=value`` to ``values``: ``bits=3``, ``low_rank.rank=16``, ``overrides.lm_head.bits=8``."""
    field, equals, text = assignment.partition("=")
    if not equals or not field:
        raise RequestError(f"--set takes field=value, not {assignment!r}")
    outer, _, inner = field.partition(".")
    if outer in _NOT_SETTABLE:
        raise RequestError(f"{outer} {_NOT_SETTABLE[outer]}, it cannot be set")
    *path, last = (outer, *inner.rsplit(".", 1)) if inner else (outer,)
    for part in path:
        known = values.get(part)
        values[part] = dict(known) if isinstance(known, dict) else {}
        values = values[part]
    values[last] = parse_value(text)


def parse_call(assignments: list[str]) -> dict[str, Any]:
    """``--call NAME=VALUE`` texts as arguments of a pipeline's call."""
    values: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals or not name.isidentifier():
            raise RequestError(f"--call takes name=value, not {assignment!r}")
        if name in ("prompts", "steps", "timesteps"):
            raise RequestError(f"{name} has an option of its own: --{name}")
        values[name] = parse_value(text)
    return values


def parse_value(text: str) -> Any:
    """JSON where it is JSON, Python's and JSON's words for true, false and nothing, else the text itself."""
    if text in _WORDS:
        return _WORDS[text]
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def parse_group(value: Any) -> Any:
    """``--group-size``: a number, "row" (None in the config) or "tensor"; anything else is for the config to refuse."""
    if isinstance(value, str) and value != "tensor":
        if value == "row":
            return None
        if not value.lstrip("-").isdigit():
            raise RequestError(f"--group-size takes a number, 'row' or 'tensor', not {value!r}")
        return int(value)
    return value
