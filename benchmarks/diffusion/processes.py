"""Rows in processes of their own, several at a time: what one of them breaks does not stop the others."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from threading import Lock
from typing import Any

from diffusion.results import Results
from diffusion.rows import Row
from diffusion.settings import Settings
from diffusion.table import table

ROOT = Path(__file__).resolve().parents[1]


def run_all(rows: list[Row], settings: Settings, options: argparse.Namespace, results: Results) -> None:
    """Rows in processes, so many turns at a time; a turn's rows one after the other."""
    turns = [list(own) for _, own in groupby(sorted(rows, key=lambda row: row.turn), key=lambda row: row.turn)]
    order = {row.name: index for index, row in enumerate(rows)}
    turns.sort(key=lambda turn: order[turn[0].name])

    lock = Lock()

    def run_turn(place: int, turn: list[Row]) -> None:
        device = settings.device
        if device == "cuda" and options.devices > 1:
            device = f"cuda:{place % options.devices}"
        for row in turn:
            facts = run_row(row, settings, device, options.minutes)
            with lock:
                results.add(row, {**facts, "device": settings.device})
                print(table([results.rows[row.name]], results.noise, heading=False), flush=True)

    with ThreadPoolExecutor(options.jobs) as pool:
        for future in [pool.submit(run_turn, place, turn) for place, turn in enumerate(turns)]:
            future.result()


def run_row(row: Row, settings: Settings, device: str, minutes: float) -> dict[str, Any]:
    """The facts of one row, or why there are none."""
    given = dataclasses.replace(settings, device=device).to_json()
    log = settings.folder / "logs" / f"{row.name}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(settings.threads), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "diffusion.worker", given, row.name]
    with log.open("w") as errors:
        try:
            process = subprocess.run(
                command, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True, timeout=60 * minutes,
                env=environment, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return {"failed": f"not done after {minutes:g} minutes"}
    try:
        facts: dict[str, Any] = json.loads(process.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        last = log.read_text().strip().splitlines()[-1:]
        return {"failed": f"exit status {process.returncode}: {''.join(last)}"}
    return facts
