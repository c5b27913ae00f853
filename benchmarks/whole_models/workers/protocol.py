"""How a worker is spoken to: one job as JSON in argv, one result as JSON in the last line of stdout.

Only the standard library is needed, so that it runs in every environment.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WEIGHT_FILES = ("*.safetensors", "*.gguf", "*.bin", "*.pt")


@dataclass
class Job:
    """What a worker is asked for.

    Attributes:
        action: "prepare" writes the model that "measure" loads, in another process.
        options: of this variant, as its worker understands them.
        source: the float model to start from.
        folder: where the variant's saved model lies.
        threads: for every library.
        new_tokens, prompt_tokens, prefill_tokens: lengths in tokens.
    """

    action: str
    options: dict[str, Any]
    source: Path
    folder: Path
    threads: int = 2
    new_tokens: int = 64
    prompt_tokens: int = 64
    prefill_tokens: int = 512

    def to_json(self) -> str:
        return json.dumps({**vars(self), "source": str(self.source), "folder": str(self.folder)})

    @classmethod
    def from_json(cls, text: str) -> Job:
        values = json.loads(text)
        return cls(**{**values, "source": Path(values["source"]), "folder": Path(values["folder"])})


@dataclass
class Clock:
    """Seconds, and the moments at which tokens came."""

    moments: list[float] = field(default_factory=list)

    def tick(self) -> None:
        self.moments.append(time.perf_counter())

    def rate(self) -> float:
        """Tokens per second from the first new token to the last: the prompt's own time is left out."""
        return (len(self.moments) - 1) / (self.moments[-1] - self.moments[0])


@contextmanager
def timed(result: dict[str, Any], name: str) -> Iterator[None]:
    """Put the seconds of the block into ``result[name]``."""
    begun = time.perf_counter()
    yield
    result[name] = time.perf_counter() - begun


def tokens(count: int, highest: int = 40_000) -> list[int]:
    """The same random token ids in every environment."""
    generator = random.Random(count)
    return [generator.randrange(10, highest) for _ in range(count)]


def memory(prefix: str) -> dict[str, float]:
    """Megabytes (1e6) of this process: the peak of its resident set so far, and what of it is now not file pages.

    From /proc: ru_maxrss would start at the parent's size.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    values = {line.split(":")[0]: line.split()[1] for line in lines if line.endswith(" kB")}
    return {
        f"{prefix}_peak_mb": int(values["VmHWM"]) * 1024 / 1e6,
        f"{prefix}_anonymous_mb": int(values["RssAnon"]) * 1024 / 1e6,
    }


def size_mb(folder: Path) -> float:
    """Megabytes (1e6) of the weight files: tokenizers are left out."""
    return sum(path.stat().st_size for pattern in WEIGHT_FILES for path in folder.rglob(pattern)) / 1e6


def serve(prepare: Callable[[Job], None], measure: Callable[[Job], dict[str, Any]]) -> None:
    """Do the job in argv."""
    job = Job.from_json(sys.argv[1])
    result: dict[str, Any] = {}
    if job.action == "prepare":
        job.folder.mkdir(parents=True, exist_ok=True)
        prepare(job)
    else:
        result = measure(job)
    print("\n" + json.dumps(result), flush=True)
