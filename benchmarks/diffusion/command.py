"""The command line."""

from __future__ import annotations

import argparse
import tempfile
from fnmatch import fnmatch
from pathlib import Path

from diffusion.processes import run_all
from diffusion.results import Results
from diffusion.rows import SEEDS, all_rows
from diffusion.settings import PIPELINES, Settings
from diffusion.table import table


def arguments(description: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", default="sd", help="sd, dit, or a folder")
    parser.add_argument("--rows", default="*", help="names or patterns with *, separated by commas")
    parser.add_argument("--list", action="store_true", help="print the names of the rows")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--calibration", type=int, default=32, help="pictures whose trajectories are recorded")
    parser.add_argument("--timesteps", type=int, help="steps of each that are; all (at most 25) if absent")
    parser.add_argument("--iterations", type=int, help="of learned rounding per block; the methods' own if absent")
    parser.add_argument("--quick", action="store_true", help="train and search next to nothing")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--devices", type=int, default=1, help="how many GPUs the rows take in turn")
    parser.add_argument("--jobs", type=int, default=1, help="rows at a time")
    parser.add_argument("--threads", type=int, default=1, help="of each row's process")
    parser.add_argument("--batch-size", type=int, default=64, help="pictures drawn at once")
    parser.add_argument("--minutes", type=float, default=60, help="of one row, at most")
    parser.add_argument("--work", type=Path, help="folder of pictures and measurements; a temporary one if absent")
    parser.add_argument("--save", action="store_true", help="keep quantized pipelines in --work")
    parser.add_argument("--output", type=Path, help="JSON; rows that it has already are kept")
    parser.add_argument("--plot", type=Path, help="a picture of the rows; beside it one of what they draw")
    options = parser.parse_args()
    patterns = options.rows.split(",")
    if unknown := [pattern for pattern in patterns if not any(fnmatch(name, pattern) for name in all_rows())]:
        parser.error(f"--rows: no row is called {', '.join(unknown)}; --list prints the names")
    if options.pipeline not in PIPELINES and not (Path(options.pipeline) / "model_index.json").is_file():
        parser.error(f"--pipeline: {options.pipeline} is neither sd, dit nor a folder of a pipeline")
    options.source = options.pipeline if options.pipeline in PIPELINES else str(Path(options.pipeline).resolve())
    options.names = [name for name in all_rows() if any(fnmatch(name, pattern) for pattern in patterns)]
    return options


def main(description: str | None) -> None:
    options = arguments(description)
    if options.list:
        print("\n".join(options.names))
        return
    with tempfile.TemporaryDirectory() as scratch:
        work = options.work or Path(scratch)
        settings = Settings(
            options.source, options.images, options.steps, options.calibration, options.timesteps,
            options.iterations, options.quick, str(work.absolute()), options.device, options.threads,
            options.batch_size, options.save,
        )  # fmt: skip
        results = Results(options.output, settings)
        from diffusion.judge import has_pictures, noise

        rows = all_rows()
        floats = [rows[name] for name in SEEDS]
        missing = [row for row in floats if not has_pictures(settings, row.name)]
        run_all(missing, settings, options, results)
        if failed := [row.name for row in floats if "failed" in results.rows.get(row.name, {})]:
            raise SystemExit(f"the float pipeline cannot draw: {results.rows[failed[0]]['failed']}")
        results.noise = {name: list(pair) for name, pair in noise(settings).items()}
        results.write()
        wanted = [rows[name] for name in options.names if name not in SEEDS and not results.has(name)]
        run_all(wanted, settings, options, results)
        shown = [results.rows[name] for name in dict.fromkeys((*SEEDS, *options.names)) if name in results.rows]
        print(table(shown, results.noise))
        if options.plot:
            from diffusion.picture import draw, draw_rows

            title = f"{settings.source.name}, {settings.images} pictures of {settings.steps} steps"
            draw(shown, results.noise, options.plot, title)
            draw_rows(settings, shown, options.plot.with_name(f"{options.plot.stem}_pictures.png"))
