"""Specifications as texts: operators of torch take plain arguments only.

They are JSON with single quotes, because inductor writes texts into C++ without escaping double ones.
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

from hf_lowbit.formats import ActivationSpec, WeightSpec


def told(spec: WeightSpec | ActivationSpec) -> str:
    """The text."""
    return spec.json.replace('"', "'")


@lru_cache(maxsize=1024)
def read_weight(text: str) -> WeightSpec:
    """The specification."""
    return WeightSpec.from_dict(_read(text))


@lru_cache(maxsize=1024)
def read_weights(text: str) -> list[WeightSpec]:
    """The specifications of several matrices, from a list of texts."""
    return [WeightSpec.from_dict(values) for values in _read(text)]


@lru_cache(maxsize=1024)
def read_activation(text: str) -> ActivationSpec | None:
    """The specification; None of an empty text."""
    return ActivationSpec.from_dict(_read(text)) if text else None


def _read(text: str) -> Any:
    return json.loads(text.replace("'", '"'))
