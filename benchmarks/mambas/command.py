"""The command line."""

from __future__ import annotations

import argparse
import tempfile
from fnmatch import fnmatch
from pathlib import Path

from mambas.results import File
from mambas.rows import REFERENCE, Row, all_rows
from mambas.settings import RANDOM, TRAINED, Settings, generation_of
from mambas.table import quality_table, speed_table


def arguments(description: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="mamba,mamba2", help=f"of {', '.join((*TRAINED, *RANDOM))}")
    parser.add_argument("--rows", default="*", help="names or patterns with *, separated by commas")
    parser.add_argument("--list", action="store_true", help="print the names of the rows")
    parser.add_argument("--speed", action="store_true", help="measure speed instead of quality")
    parser.add_argument("--tokens", type=int, default=Settings.tokens, help="of the held-out text; it has 39,888")
    parser.add_argument("--length", type=int, default=Settings.length, help="tokens of a window")
    parser.add_argument("--samples", type=int, default=Settings.samples, help="windows to calibrate on")
    parser.add_argument("--rounds", type=int, default=7, help="of speed")
    parser.add_argument("--threads", type=int, help="of torch; its own choice if absent")
    parser.add_argument("--again", action="store_true", help="measure rows that the file has")
    parser.add_argument("--output", type=Path, help="JSON; rows that it has already are kept")
    parser.add_argument("--plot", type=Path, help="a picture of the quality")
    options = parser.parse_args()
    options.models, options.patterns = options.models.split(","), options.rows.split(",")
    known = (*TRAINED, *RANDOM) if options.speed else tuple(TRAINED)
    if unknown := [model for model in options.models if model not in known]:
        parser.error(f"--models: no model is called {', '.join(unknown)}; known here: {', '.join(known)}")
    names = {name for model in options.models for name in all_rows(generation_of(model))}
    if unknown := [pattern for pattern in options.patterns if not any(fnmatch(name, pattern) for name in names)]:
        parser.error(f"--rows: no row is called {', '.join(unknown)}; --list prints the names")
    return options


def wanted(model: str, options: argparse.Namespace) -> list[Row]:
    """The rows that were asked for; of speed those that are timed, with the float one first."""
    rows = all_rows(generation_of(model)).values()
    chosen = [row for row in rows if any(fnmatch(row.name, pattern) for pattern in options.patterns)]
    if options.speed:
        chosen = [row for row in chosen if row.timed and row.name != REFERENCE]
        chosen.insert(0, all_rows(generation_of(model))[REFERENCE])
    return chosen


def main(description: str | None) -> None:
    options = arguments(description)
    if options.list:
        for model in options.models:
            print(f"{model}: {', '.join(row.name for row in wanted(model, options))}")
        return
    import torch

    if options.threads:
        torch.set_num_threads(options.threads)
    file = File(options.output)
    if options.speed:
        measure_speeds(options, file)
    else:
        measure_quality(options, file)
    if options.plot:
        from mambas.picture import draw

        draw({model: list(file.rows(settings_of(model, options)).values()) for model in options.models}, options.plot)


def settings_of(model: str, options: argparse.Namespace) -> Settings:
    return Settings(model, options.tokens, options.length, samples=options.samples)


def measure_quality(options: argparse.Namespace, file: File) -> None:
    """Of every model, the rows that are missing."""
    from mambas.quality import Quality

    for model in options.models:
        settings, rows = settings_of(model, options), wanted(model, options)
        quality = Quality(settings)
        for row in rows:
            if options.again or not file.has(settings, row):
                entry = file.add(settings, row, quality.measure(row))
                print(quality_table([entry], heading=False), flush=True)
        known = file.rows(settings)
        print(f"\n{model}\n{quality_table([known[row.name] for row in rows])}\n", flush=True)


def measure_speeds(options: argparse.Namespace, file: File) -> None:
    """Of every model, all rows in one run."""
    import torch
    from whole_models.command import conditions

    from mambas.speed import measure_speed

    with tempfile.TemporaryDirectory() as work:
        for model in options.models:
            facts = conditions(torch.get_num_threads(), options.rounds)
            rows = measure_speed(model, wanted(model, options), options.rounds, Path(work))
            file.add_speed(model, facts, rows)
            print(f"\n{model}\n{speed_table(rows)}\n", flush=True)
