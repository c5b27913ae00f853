"""The command line."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import time
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from gpu import kernels, models, peers
from gpu.generating import GENERATE
from gpu.table import kernel_line, kernel_table, model_table, share_table
from gpu.timing import copy_bandwidth

PARTS = ("kernels", "peers", "models")


def arguments(description: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help=f"parts, of {','.join(PARTS)}")
    parser.add_argument("--weights", default="*", help="of our kernels: names or patterns with *, with semicolons")
    parser.add_argument("--shapes", type=int, default=len(kernels.SHAPES), help="how many matrix shapes")
    parser.add_argument("--tokens", default=",".join(map(str, kernels.TOKENS)), help="at once, separated by commas")
    parser.add_argument("--peers", default=",".join(peers.PEERS), help="names, separated by commas")
    parser.add_argument("--models", default=",".join(models.SHAPES), help=f"of {','.join(models.SHAPES)}")
    parser.add_argument("--variants", help="of the models: the beginnings of their names, separated by commas")
    parser.add_argument(
        "--generate", default=",".join(GENERATE), help=f"how, of {','.join(GENERATE)}; compiling takes minutes"
    )
    parser.add_argument("--output", type=Path, help="JSON; written anew after every row")
    parser.add_argument("--plot", type=Path, help="PNG")
    options = parser.parse_args()
    lists = {"only": PARTS, "peers": tuple(peers.PEERS), "models": tuple(models.SHAPES), "generate": tuple(GENERATE)}
    for name, known in lists.items():
        chosen = [part for part in getattr(options, name).split(",") if part]
        if unknown := set(chosen) - set(known):
            parser.error(f"--{name}: nothing is called {', '.join(sorted(unknown))}; there are {', '.join(known)}")
        setattr(options, name, chosen)
    options.weights = options.weights.split(";")
    options.tokens = [int(count) for count in options.tokens.split(",")]
    options.variants = None if options.variants is None else tuple(options.variants.split(","))
    return options


def conditions() -> dict[str, Any]:
    """What the numbers depend on."""
    packages = ("torch", "triton", "transformers", "hf_lowbit")
    versions = {name: importlib.metadata.version(name) for name in packages}
    others = {peer.package: peers.version(peer) for peer in peers.PEERS.values()}
    return {"device": torch.cuda.get_device_name(), "copy_gb_s": copy_bandwidth() / 1e3, **versions, **others}


def product_rows(options: argparse.Namespace, bandwidth: float) -> Iterator[dict[str, Any]]:
    """Ours and the peers', a shape after the other."""
    for place, (rows, columns) in enumerate(kernels.SHAPES[: options.shapes]):
        floats = kernels.time_floats(rows, columns, options.tokens)
        if "peers" in options.only:
            for name in options.peers:
                if place < peers.PEERS[name].shapes:
                    yield from peers.measure(name, rows, columns, floats)
        if "kernels" in options.only:
            for spec, activation in kernels.cases(others=place < kernels.OTHERS):
                if any(fnmatch(kernels.name_of(spec, activation), pattern) for pattern in options.weights):
                    yield from kernels.measure(rows, columns, spec, activation, floats, bandwidth)


def model_rows(options: argparse.Namespace, bandwidth: float) -> Iterator[dict[str, Any]]:
    """Of every shape all variants."""
    for shape in options.models:
        chosen = [v for v in models.VARIANTS if options.variants is None or v.name.startswith(options.variants)]
        yield from models.measure(shape, chosen, bandwidth, options.generate)


def main(description: str | None) -> None:
    options = arguments(description)
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs an NVIDIA GPU")
    begun = time.perf_counter()
    torch.manual_seed(0)
    report: dict[str, Any] = {**conditions(), "rows": [], "models": []}
    print(f"{report['device']}: copies {report['copy_gb_s']:.0f} GB/s", flush=True)
    bandwidth = 1e3 * report["copy_gb_s"]  # bytes per microsecond
    for row in product_rows(options, bandwidth):
        report["rows"].append(row)
        _write(report, options)
        print(f"{time.perf_counter() - begun:5.0f} s  {kernel_line(row)}", flush=True)
    for row in model_rows(options, bandwidth) if "models" in options.only else ():
        report["models"].append(row)
        _write(report, options)
        print(f"{time.perf_counter() - begun:5.0f} s  {row}", flush=True)
    for table, part in ((kernel_table, "rows"), (share_table, "rows"), (model_table, "models")):
        print(f"\n{table(report[part])}", flush=True)
    if options.plot:
        from gpu.picture import draw

        draw(report, options.plot)


def _write(report: dict[str, Any], options: argparse.Namespace) -> None:
    if options.output:
        options.output.write_text(json.dumps(report, indent=1) + "\n")
