"""The command line."""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_lowbit.evaluation.plots import check_picture
from quality.judge import Judge, difference, summary
from quality.picture import draw, nominal_bits
from quality.task import Task
from quality.variants import VARIANTS, Variant

Prepare = Callable[[argparse.Namespace, Path], Task]

_HERE = Path(__file__).parent


def arguments(description: str | None, **defaults: Any) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="instead of the testbed's")
    parser.add_argument("--bits", default="4,3,2")
    parser.add_argument("--group", default="64", help="weights per scale, or row")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=16384, help="held-out tokens, of text")
    ours = [name for name, v in VARIANTS.items() if v.by_default and ":" not in v.method]
    parser.add_argument("--methods", default=",".join(ours))
    parser.add_argument("--peers", type=Path, help="folder of virtual environments, see benchmarks/peers")
    parser.add_argument("--device", default="cpu", help="for the methods of hf_lowbit, and for judging")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON; rows that it has already are kept")
    parser.add_argument(
        "--plot", type=Path, help="a picture, also of earlier rows in --output of the same data and group"
    )
    parser.set_defaults(**defaults)
    values = parser.parse_args()
    values.bits = [int(bits) for bits in values.bits.split(",")]
    values.group = None if values.group == "row" else int(values.group)
    values.methods = values.methods.split(",")
    if unknown := set(values.methods) - set(VARIANTS):
        parser.error(f"--methods: no {', '.join(sorted(unknown))}; there are {', '.join(VARIANTS)}")
    if values.plot:
        try:
            check_picture(values.plot)
        except (ImportError, ValueError) as error:
            parser.error(f"--plot: {error}")
    return values


def main(description: str | None, prepare: Prepare, **defaults: Any) -> None:
    """Measure what is missing, and show all; ``defaults`` of the options."""
    options = arguments(description, **defaults)
    import torch

    torch.set_num_threads(options.threads)
    rows: list[dict[str, Any]] = []
    if options.output and options.output.exists():
        rows = json.loads(options.output.read_text())["rows"]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        task = prepare(options, folder)
        name = task.model.name
        judge = Judge(task, task.load(task.model).to(options.device).eval(), folder)
        for bits in options.bits:
            for variant in options.methods:
                key = {
                    "variant": variant,
                    "bits": bits,
                    "group": options.group,
                    "samples": options.samples,
                    "length": options.length,
                }
                if any(all(row.get(k) == v for k, v in key.items()) for row in rows):
                    continue
                row = {**key, **run(VARIANTS[variant], bits, task, folder, options, judge)}
                rows.append(row)
                print(line(row), flush=True)
                if options.output:
                    options.output.write_text(json.dumps({"model": name, "rows": rows}, indent=1))
    if options.plot:
        same = {"group": options.group, "samples": options.samples, "length": options.length}
        shown = [row for row in rows if all(row.get(name) == value for name, value in same.items())]
        draw(shown, options.plot, f"{name}, calibrated on {options.samples} x {options.length} tokens")
    for bits in options.bits:
        print(table([row for row in rows if row["bits"] == bits and row["group"] == options.group]))


def run(
    variant: Variant, bits: int, task: Task, folder: Path, options: argparse.Namespace, judge: Judge
) -> dict[str, Any]:
    """Quantize in a fresh process, then judge."""
    output, facts = folder / "result", folder / "facts.json"
    order: dict[str, Any] = {
        "model": str(task.model.absolute()),
        "data": str(task.data),
        "length": options.length,
        "output": str(output),
        "facts": str(facts),
        "threads": options.threads,
        "device": options.device,
        "bits": bits,
        "group": options.group,
        "method": variant.method,
        "fields": variant.fields,
    }
    is_peer = variant.method.startswith("peer:")
    if is_peer:
        peer = variant.method.removeprefix("peer:")
        worker = f"peer_{peer}"  # no file called as what it imports
        python = options.peers.absolute() / peer / "bin" / "python"
    else:
        worker, python = "ours", Path(sys.executable)
        order["fields"] = {"bits": bits, "group_size": options.group, **task.fields, **variant.fields}
    path = folder / "order.json"
    path.write_text(json.dumps(order))
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    begun, used = time.monotonic(), _processor_seconds()
    command = [str(python), str(_HERE / "workers" / f"{worker}.py"), str(path)]
    result = subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment, cwd=folder
    )  # where a peer leaves logs
    if result.returncode:
        return {"failed": (result.stderr or result.stdout)[-600:]}
    found = {
        **json.loads(facts.read_text()),
        "process_seconds": time.monotonic() - begun,
        "processor_seconds": _processor_seconds() - used,
    }
    if is_peer:  # judged by its dequantized weights
        found["bits_per_weight"] = nominal_bits(bits, options.group, variant.fields.get("symmetric", True))
    found |= summary(judge.score(task.load(output).to(options.device).eval()))
    shutil.rmtree(output)
    return found


def _processor_seconds() -> float:
    """Of all cores, in processes that were run and have ended: what else the machine does tells little on it."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def line(row: dict[str, Any]) -> str:
    if "failed" in row:
        return f"{row['variant']:22s} {row['bits']} bits: FAILED: {row['failed'][-300:]}"
    low, high = row["intervals"]["kl"]
    return (
        f"{row['variant']:22s} {row['bits']} bits: KL {row['kl']:.4f} [{low:.4f}, {high:.4f}] perplexity "
        f"{row['perplexity']:.2f} ({row['reference_perplexity']:.2f}) {row.get('bits_per_weight', float('nan')):.3f} "
        f"bits/weight {row['seconds']:.0f} s {row['peak_mb']:.0f} MB"
    )


def table(rows: list[dict[str, Any]]) -> str:
    """Rows by KL, each with its paired difference from the one above it."""
    good = sorted((row for row in rows if "kl" in row), key=lambda row: row["kl"])
    lines = [f"\n{good[0]['bits']} bits, the smallest KL first" if good else "nothing was measured"]
    for above, row in zip([None, *good], good, strict=False):
        change = "" if above is None else " +{:.4f} [{:.4f}, {:.4f}]".format(*difference(row, above))
        lines.append(line(row) + change)
    return "\n".join(lines)
