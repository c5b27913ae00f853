"""Layers grouped by kind."""

from __future__ import annotations

import pytest

from hf_lowbit.evaluation.layer_errors import Panel, panels_of
from hf_lowbit.reporting import LayerReport, Report


def report(errors: dict[str, float | None]) -> Report:
    layers = [
        LayerReport(name, "linear", "int", 4, 64, True, "decoded", 10, 5, error=error) for name, error in errors.items()
    ]
    return Report("rtn", layers)


def test_panels_of_a_language_model() -> None:
    names = ("model.layers.0.q", "model.layers.0.down", "model.layers.2.q", "model.layers.2.down", "lm_head")
    found = panels_of(report({f"{name}.weight": i / 10 for i, name in enumerate(names)}))
    assert found == [
        Panel("q", [0, 2], [0.0, 0.2]),
        Panel("down", [0, 2], [0.1, 0.3]),
        Panel("lm_head", [0], [0.4]),
    ]


def test_unmeasured_layers_are_left_out() -> None:
    assert panels_of(report({"lm_head.weight": None})) == []


def test_encoder_and_decoder_are_two_kinds() -> None:
    names = [f"model.{side}.layers.{i}.fc1.weight" for side in ("encoder", "decoder") for i in range(2)]
    assert [panel.kind for panel in panels_of(report(dict.fromkeys(names, 0.1)))] == [
        "model.encoder.layers.*.fc1",
        "model.decoder.layers.*.fc1",
    ]


def test_names_with_several_numbers_count_in_order() -> None:
    names = [f"down.{i}.blocks.{j}.q" for i in range(2) for j in range(2)]
    (panel,) = panels_of(report(dict.fromkeys(names, 0.1)))
    assert (panel.kind, panel.places) == ("q", [0, 1, 2, 3])


def test_too_many_kinds_are_the_last_parts_of_names() -> None:
    names = [f"part{letter}.0.{last}" for letter in "abcdefghijklmnop" for last in ("q", "k")]
    assert [(panel.kind, len(panel.errors)) for panel in panels_of(report(dict.fromkeys(names, 0.1)))] == [
        ("q", 16),
        ("k", 16),
    ]


@pytest.mark.parametrize("name", ["0.weight", "layers.10.weight"])
def test_a_module_that_is_a_number(name: str) -> None:
    assert sum(len(panel.errors) for panel in panels_of(report({name: 0.5}))) == 1
