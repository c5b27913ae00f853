"""Runs workers: one fresh process per variant and round, all variants in turn, so that noise meets them alike."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from json import loads
from pathlib import Path
from typing import Any

from whole_models.sources import source
from whole_models.usage import Usage
from whole_models.variants import OURS, Variant
from whole_models.workers.protocol import Job

PREPARE_SECONDS = 900
MEASURE_SECONDS = 300


class WorkerError(RuntimeError):
    """A worker that cannot run, crashed or took too long; the message is a row's reason."""


@dataclass
class Bench:
    """Where and how workers run.

    Attributes:
        work: folder of saved models.
        peers: folder of the peers' virtual environments, ``peer-<name>`` or ``<name>`` each; None: there are none.
        threads: of every worker.
    """

    work: Path
    peers: Path | None = None
    threads: int = 2
    reasons: dict[tuple[str, str], str] = field(default_factory=dict)

    def interpreter(self, environment: str) -> Path:
        """Raises WorkerError where there is no such environment."""
        if environment == OURS:
            return Path(sys.executable)
        if self.peers is None:
            raise WorkerError("not measured: no environment given")
        for name in (f"peer-{environment}", environment):
            if (python := self.peers / name / "bin" / "python").exists():
                return python
        raise WorkerError(f"not measured: no environment named {environment} or peer-{environment}")

    def call(self, action: str, variant: Variant, seconds: float) -> dict[str, Any]:
        """One worker's result. Raises WorkerError."""
        folder = self.work / variant.stored
        job = Job(action, variant.options, source(variant, self.work), folder, self.threads, variant.new_tokens)
        command = [self.interpreter(variant.environment), "-m", f"whole_models.workers.{variant.worker}", job.to_json()]
        usage = Usage()
        try:
            done = subprocess.run(
                command, cwd=Path(__file__).parents[1], env=self._variables(), capture_output=True, timeout=seconds
            )
        except subprocess.TimeoutExpired:
            raise WorkerError(f"{action}: no result in {seconds:.0f} s") from None
        if done.returncode:
            lines = done.stderr.decode(errors="replace").strip().splitlines() or [f"exit status {done.returncode}"]
            raise WorkerError(f"{action}: {_without_folders(lines[-1])[:200]}")
        result: dict[str, Any] = loads(done.stdout.decode(errors="replace").strip().splitlines()[-1])
        return {**result, "others_cores": usage.of_others()}

    def _variables(self) -> dict[str, str]:
        caches = {"TORCHINDUCTOR_CACHE_DIR": str(self.work / "inductor")}
        quiet = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        return {**os.environ, **caches, **quiet, "OMP_NUM_THREADS": str(self.threads)}

    def prepare(self, variant: Variant) -> None:
        """Write the variant's saved model, unless an earlier one did."""
        done = self.work / f"{variant.stored}.done"
        if not done.exists():
            self.call("prepare", variant, PREPARE_SECONDS)
            done.touch()

    def run(self, chosen: Sequence[Variant], count: int) -> dict[tuple[str, str], list[dict[str, Any]]]:
        """(task, name) -> results of the rounds. What fails is left out from then on, and its reason kept."""
        results: dict[tuple[str, str], list[dict[str, Any]]] = {(v.task, v.name): [] for v in chosen}
        for number in range(-1, count):
            for variant in chosen:
                key = (variant.task, variant.name)
                if key in self.reasons:
                    continue
                try:
                    if number < 0:
                        self.prepare(variant)
                    else:
                        results[key].append(self.call("measure", variant, MEASURE_SECONDS))
                except WorkerError as error:
                    self.reasons[key] = str(error)
                state = self.reasons.get(key, "prepared" if number < 0 else f"round {number + 1} of {count}")
                print(f"{variant.task:10} {variant.name:22} {state}", file=sys.stderr, flush=True)
        return results


def _without_folders(text: str) -> str:
    """Reasons are published: paths keep their last part only."""
    return re.sub(r"/[^\s'\"]*/", "", text)
