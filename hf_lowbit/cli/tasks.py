"""``hf-lowbit evaluate --tasks``: tasks of lm-eval on the model, and on the reference beside it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from hf_lowbit.cli.console import say
from hf_lowbit.cli.errors import RequestError

TASKS = typer.Option(
    metavar="NAME,...", help="Also tasks, groups or tags of lm-eval; needs the extra lm-eval.", show_default=False
)
TASK_FOLDER = typer.Option(help="Tasks: a folder with task files (YAML) of your own.", show_default=False)
LIMIT = typer.Option(help="Tasks: how many examples of each.", min=1, show_default="all")
SHOTS = typer.Option(help="Tasks: solved examples before each question.", min=0, show_default="the task's")
BATCH_SIZE = typer.Option(help="Tasks: sequences at once.", min=1)


@dataclass(frozen=True)
class TaskRequest:
    """What the options ask for.

    Attributes:
        names: of tasks, groups or tags, separated by commas; None for no tasks.
        folder: with task files.
        limit, shots, batch_size: as of :func:`hf_lowbit.evaluation.run_tasks`.
    """

    names: str | None = None
    folder: Path | None = None
    limit: int | None = None
    shots: int | None = None
    batch_size: int = 1

    def load(self) -> dict[str, Any]:
        """The tasks with their data, before any model is loaded; none if none is asked for."""
        if self.names is None:
            given = {"--task-folder": self.folder, "--limit": self.limit, "--shots": self.shots}
            if extra := [option for option, value in given.items() if value is not None]:
                raise RequestError(f"{extra[0]} is about tasks, and --tasks names none")
            return {}
        names = [name.strip() for name in self.names.split(",") if name.strip()]
        if not names:
            raise RequestError("--tasks takes names separated by commas, such as arc_easy,piqa")
        from hf_lowbit.evaluation import load_tasks

        say(f"reading the tasks {', '.join(names)}")
        return load_tasks(names, self.folder)

    def options(self) -> dict[str, Any]:
        """The options that were given, for a command that repeats the run; of a folder its name."""
        folder = None if self.folder is None else self.folder.name
        given = {"--tasks": self.names, "--task-folder": folder, "--limit": self.limit, "--shots": self.shots}
        return {} if self.names is None else {**given, "--batch-size": self.batch_size}

    def run(self, tasks: dict[str, Any], measured: Any, model: str, reference: str | None, seed: int) -> dict[str, Any]:
        """Results under "tasks", and of the reference under "reference_tasks"; empty without tasks."""
        if not tasks:
            return {}
        from transformers import AutoTokenizer

        from hf_lowbit.cli.measure import in_float32
        from hf_lowbit.cli.run import load
        from hf_lowbit.evaluation import run_tasks

        tokenizer = AutoTokenizer.from_pretrained(model)
        options: dict[str, Any] = {
            "limit": self.limit,
            "shots": self.shots,
            "batch_size": self.batch_size,
            "seed": seed,
        }
        say("running the tasks on the model")
        found = {"tasks": run_tasks(measured, tokenizer, tasks, **options)}
        if reference is not None:
            compared = in_float32(load(reference, "loading the reference"))
            say("running the tasks on the reference")
            found["reference_tasks"] = run_tasks(compared, tokenizer, tasks, **options)
        return found


def task_rows(values: dict[str, Any]) -> list[tuple[str, str]]:
    """Label and value of every metric of every task, the reference's in brackets."""
    rows = []
    for name, task in values.get("tasks", {}).items():
        others = values.get("reference_tasks", {}).get(name, {"metrics": {}})["metrics"]
        for metric, result in task["metrics"].items():
            reference = f"  (reference: {_number(others[metric])})" if metric in others else ""
            rows.append((f"{name}, {metric}", f"{_number(result)}{reference}"))
    return rows


def _number(result: dict[str, float]) -> str:
    error = f" ± {result['standard_error']:.4f}" if "standard_error" in result else ""
    return f"{result['value']:.4f}{error}"
