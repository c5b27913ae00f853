"""Pictures: what is drawn, with labels and units, and what is refused before."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from hf_lowbit.evaluation import plots
from hf_lowbit.evaluation.layer_errors import Panel
from hf_lowbit.evaluation.plots import check_picture, draw_layer_errors, draw_quality
from hf_lowbit.evaluation.points import Point, SourceError


def point(label: str = "rtn", bits: float = 4.5, kl: float = 0.1, **values: float) -> Point:
    return Point(label, bits, {"kl": kl, **values}, {"kl": (0.8 * kl, 1.5 * kl)})


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are drawn."""
    pytest.importorskip("matplotlib")
    drawn: list[Any] = []
    make = plots._figure

    def keep(width: float, height: float) -> Any:
        drawn.append(make(width, height))
        return drawn[-1]

    monkeypatch.setattr(plots, "_figure", keep)
    return drawn


def test_quality(figures: list[Any], tmp_path: Path) -> None:
    path = tmp_path / "quality.png"
    draw_quality([point(bits=4.5), point(bits=2.5, kl=3.0), point("gptq", 3.25, 0.05)], path, title="a model")
    assert path.read_bytes().startswith(b"\x89PNG")
    (axes,) = figures[-1].axes
    assert axes.get_yscale() == "log" and "nats" in axes.get_ylabel() and "bits" in axes.get_xlabel()
    assert axes.get_title(loc="left") == "a model"
    gptq, rtn = (container for container in axes.containers)
    assert (gptq.get_label(), rtn.get_label()) == ("gptq", "rtn")
    assert rtn.lines[0].get_xdata().tolist() == [2.5, 4.5] and rtn.lines[0].get_ydata().tolist() == [3.0, 0.1]
    (segments,) = rtn.lines[2]
    assert segments.get_segments()[1][:, 1] == pytest.approx([0.08, 0.15])
    assert [text.get_text() for text in figures[-1].legends[0].get_texts()] == ["gptq", "rtn"]


def test_perplexity_shows_the_float_model(figures: list[Any], tmp_path: Path) -> None:
    values = {"perplexity": 22.0, "reference_perplexity": 20.0}
    draw_quality([point(**values), point("gptq", 3.25, **values)], tmp_path / "p.svg", "perplexity")
    labels = [text.get_text() for text in figures[-1].legends[0].get_texts()]
    assert labels == ["float: 20", "gptq", "rtn"]
    ticks = [tick.get_text() for tick in figures[-1].axes[0].get_yticklabels()]
    assert len(ticks) >= 3  # although all values lie between 20 and 22


def test_agreement_is_in_per_cent(figures: list[Any], tmp_path: Path) -> None:
    draw_quality([point(top1_agreement=0.75)], tmp_path / "a.pdf", "top1_agreement")
    (axes,) = figures[-1].axes
    assert axes.containers[0].lines[0].get_ydata() == pytest.approx([75.0]) and axes.get_ylabel().endswith("%")


def test_every_label_looks_different() -> None:
    pytest.importorskip("matplotlib")
    assert len({tuple(map(str, plots._style(index).values())) for index in range(30)}) == 30


def test_layer_errors(figures: list[Any], tmp_path: Path) -> None:
    models = {
        "w4": [Panel("q_proj", [0, 1], [0.1, 0.2]), Panel("lm_head", [0], [0.05])],
        "w3": [Panel("q_proj", [0, 1], [0.3, 0.4])],
    }
    draw_layer_errors(models, tmp_path / "errors.png")
    first, second = (axes for axes in figures[-1].axes if axes.get_visible())
    assert [first.get_title(loc="left"), second.get_title(loc="left")] == ["q_proj", "lm_head"]
    assert [list(line.get_ydata()) for line in first.lines] == [[0.1, 0.2], [0.3, 0.4]] and len(second.lines) == 1
    assert first.get_ylim() == second.get_ylim() and first.get_ylim()[0] == 0
    assert "||W - Q|| / ||W||" in figures[-1]._supylabel.get_text() and figures[-1]._supxlabel.get_text() == "block"
    assert [text.get_text() for text in figures[-1].legends[0].get_texts()] == ["w4", "w3"]


@pytest.mark.parametrize(
    ("points", "metric", "message"),
    [
        ([], "kl", "nothing to plot"),
        ([point()], "loss", "unknown metric 'loss'; known: kl"),
        ([point(), point("gptq", top1_agreement=0.9)], "top1_agreement", "rtn at 4.5 bits .* needs --reference"),
        ([point(kl=0.0)], "kl", "no place on a logarithmic axis"),
    ],
)
def test_points_that_cannot_be_drawn(
    figures: list[Any], tmp_path: Path, points: Any, metric: str, message: str
) -> None:
    with pytest.raises(SourceError, match=message):
        draw_quality(points, tmp_path / "q.png", metric)
    assert not list(tmp_path.iterdir())


def test_files_that_cannot_be_written(figures: list[Any], tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"written as .png, .svg, .pdf, not 'q.jpg'"):
        check_picture(tmp_path / "q.jpg")
    with pytest.raises(SourceError, match="no folder"):
        check_picture(tmp_path / "none" / "q.png")
    with pytest.raises(SourceError, match="no layer has a measured error"):
        draw_layer_errors({"w4": []}, tmp_path / "q.png")


def test_a_missing_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"hf_lowbit\[eval\]"):
        check_picture(tmp_path / "q.png")
