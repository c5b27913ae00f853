"""The command line."""

from __future__ import annotations

import argparse
import json
import tempfile
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from quality.judge import Judge
from quality.language import prepare

from low_rank_rows.rows import BITS, GROUP, Row, all_rows
from low_rank_rows.table import table


def arguments(description: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a causal language model; SmolLM2-135M if absent")
    parser.add_argument("--only", default="*", help="rows, by names or patterns with *, separated by commas")
    parser.add_argument("--list", action="store_true", help="print the names of the rows")
    parser.add_argument("--layers", action="store_true", help="check the order of the metrics on every layer")
    parser.add_argument("--bits", default=",".join(map(str, BITS)), help="of --layers")
    parser.add_argument("--rank", type=int, default=16, help="of --layers")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=16384, help="held-out tokens")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON; rows that it has already are kept")
    parser.add_argument("--plot", type=Path, help="a picture of the rows of --only")
    options = parser.parse_args()
    names = list(all_rows())
    patterns = options.only.split(",")
    if unknown := [pattern for pattern in patterns if not any(fnmatch(name, pattern) for name in names)]:
        parser.error(f"--only: no row is called {', '.join(unknown)}; --list prints the names")
    options.names = [name for name in names if any(fnmatch(name, pattern) for pattern in patterns)]
    return options


def main(description: str | None) -> None:
    options = arguments(description)
    if options.list:
        print("\n".join(options.names))
        return
    import torch

    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        task = prepare(options, folder)
        ids = torch.load(task.data)
        model = task.load(task.model).to(options.device).eval()
        if options.layers:
            check_layers(model, ids, options)
        else:
            compare(model, ids, Judge(task, model, folder), task.model.name, options)


def compare(model: Any, ids: Any, judge: Judge, name: str, options: argparse.Namespace) -> None:
    """Measure what is missing, and show all."""
    from low_rank_rows.measure import measure

    rows = all_rows()
    stored: list[dict[str, Any]] = []
    if options.output and options.output.exists():
        stored = json.loads(options.output.read_text())["rows"]
    settings = {"samples": options.samples, "length": options.length, "tokens": options.tokens, "seed": options.seed}
    same = [row for row in stored if all(row.get(key) == value for key, value in settings.items())]
    known = {row["name"] for row in same}
    for chosen in options.names:
        if chosen in known:
            continue
        row = rows[chosen]
        found = {**_key(row), **settings, **measure(row, rows, model, ids, judge)}
        same.append(found)
        stored.append(found)
        print(table([found]), flush=True)
        if options.output:
            options.output.write_text(json.dumps({"model": name, "rows": stored}, indent=1))
    print(table(same))
    if options.plot:
        from hf_lowbit.evaluation import draw_quality, points_of

        title = f"{name}, calibrated on {options.samples} x {options.length} tokens"
        shown = [row for row in same if row["name"] in options.names]
        draw_quality(points_of(shown, "the benchmark"), options.plot, title=title)


def check_layers(model: Any, ids: Any, options: argparse.Namespace) -> None:
    """Every layer at every width; exits with what is out of order."""
    from low_rank_rows.layers import disorder, exceptions, layer_errors

    found, wrong = {}, []
    for bits in map(int, options.bits.split(",")):
        errors = layer_errors(model, ids, bits, options.rank)
        found[bits] = errors
        for metric in next(iter(errors.values())):
            left = sum(own[metric] for own in errors.values()) / len(errors)
            print(f"{bits} bits, groups of {GROUP}, rank {options.rank}: {metric} leaves {left:.4f} of the error, mean")
        print("\n".join(exceptions(errors)))
        wrong += [f"{bits} bits, {name}: {why}" for name, own in errors.items() if (why := disorder(own))]
    if options.output:
        options.output.write_text(json.dumps({"rank": options.rank, "layers": found}, indent=1))
    count = sum(len(errors) for errors in found.values())
    if wrong:
        raise SystemExit("\n".join([f"{len(wrong)} of {count} layers are out of order:", *wrong]))
    print(f"full <= diag, mean_abs and identity on all {count} layers")


def _key(row: Row) -> dict[str, Any]:
    bits = row.fields.get("bits")
    return {"name": row.name, "variant": row.series, "method": row.method, "bits": bits}
