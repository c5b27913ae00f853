"""``hf-lowbit plot``: quality against bits per weight, or the error of each layer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hf_lowbit.cli.app import command
from hf_lowbit.cli.console import screen, work

if TYPE_CHECKING:
    from hf_lowbit.reporting import Report


@command("plot")
def plot_command(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE...",
            help="Folders of saved models, measured with evaluate --save, and JSON files of evaluate --json.",
            show_default=False,
        ),
    ],
    output: Annotated[Path, typer.Option(help="The picture: .png, .svg or .pdf.", show_default=False)],
    metric: Annotated[str, typer.Option(help="kl, perplexity or top1_agreement.")] = "kl",
    errors: Annotated[
        bool, typer.Option("--errors", help="Folders: the relative weight error of each layer instead, from reports.")
    ] = False,
    title: Annotated[str, typer.Option(help="Above the picture.", show_default=False)] = "",
) -> None:
    """Draw quality against bits per weight, a line per method, or the error of each layer."""
    with work():
        from hf_lowbit.evaluation import draw_layer_errors, draw_quality, read_points
        from hf_lowbit.evaluation.layer_errors import panels_of
        from hf_lowbit.evaluation.plots import check_picture

        check_picture(output, metric)
        if errors:
            models = {name: panels_of(report) for name, report in _reports(sources).items()}
            draw_layer_errors(models, output, title)
        else:
            draw_quality([point for source in sources for point in read_points(source)], output, metric, title)
    screen().print(f"Written to {output}", soft_wrap=True, markup=False)


def _reports(sources: list[str]) -> dict[str, Report]:
    """By the last part of their folders' names, or the whole where two are the same."""
    from hf_lowbit.cli.account import accounts

    found = [
        (Path(source, part), account.report) for source in sources for part, account in accounts(Path(source)).items()
    ]
    names = [path.resolve().name for path, _ in found]
    return {
        name if names.count(name) == 1 else str(path): report for name, (path, report) in zip(names, found, strict=True)
    }
