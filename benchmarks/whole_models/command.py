"""The command line."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import tempfile
from pathlib import Path
from typing import Any

from whole_models.picture import draw
from whole_models.rounds import Bench
from whole_models.summary import rows, text
from whole_models.usage import others_cores
from whole_models.variants import TASKS, idle, peers, variants
from whole_models.workers.native import native_library


def arguments(description: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(TASKS), help=f"tasks, of {','.join(TASKS)}")
    parser.add_argument("--variants", default="*", help="names or patterns with *, with semicolons")
    parser.add_argument("--peers", type=Path, help="folder of virtual environments, see benchmarks/peers")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, help="keep saved models here (5 GB); a temporary folder if absent")
    parser.add_argument("--output", type=Path, help="JSON with every round")
    parser.add_argument("--plot", type=Path, help="PNG of the decode speeds")
    values = parser.parse_args()
    values.only = values.only.split(",")
    if unknown := set(values.only) - set(TASKS):
        parser.error(f"--only: no task {', '.join(sorted(unknown))}; there are {', '.join(TASKS)}")
    return values


def processor() -> str:
    """The processor's name."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def conditions(threads: int, rounds: int) -> dict[str, Any]:
    """What the numbers depend on; load averages are of 1, 5 and 15 minutes before the start."""
    from hf_lowbit.kernels import cpu

    packages = ("torch", "transformers", "diffusers", "hf_lowbit")
    return {
        "processor": processor(),
        "instruction_sets": cpu.instruction_sets(),
        "threads": threads,
        "rounds": rounds,
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "load_before": os.getloadavg(),
        "others_cores_before": others_cores(),
        "native_library": native_library(),
        **{name: importlib.metadata.version(name) for name in packages},
    }


def main(description: str | None) -> None:
    options = arguments(description)
    report = conditions(options.threads, options.rounds)
    chosen = [variant for task in options.only for variant in variants(task, options.variants.split(";"))]
    extra = idle() if "smollm2" in options.only else []
    with tempfile.TemporaryDirectory() as temporary:
        work = (options.work or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        bench = Bench(work, options.peers.absolute() if options.peers else None, options.threads)
        results = bench.run([*extra, *chosen], options.rounds)
    table = rows(chosen, results, bench.reasons)
    report["load_after"] = os.getloadavg()
    if native_library() != report["native_library"]:
        report["warning"] = "the native library was rebuilt during the run: rounds are of different builds"
    report["idle"] = {variant.name: results[variant.task, variant.name] for variant in extra}
    print(f"{report}\n\n{text(table)}")
    if options.output:
        options.output.write_text(json.dumps({**report, "rows": table}, indent=1) + "\n")
    if options.plot:
        machine = f"{report['threads']} threads of {report['processor']}"
        draw(table, {variant.name for variant in peers()}, machine, options.plot)
