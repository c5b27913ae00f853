"""Tasks of the Language Model Evaluation Harness (lm-eval), run on a model that is loaded already.

lm-eval is the extra ``lm-eval``: it brings some 40 packages with it.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_lowbit.evaluation.logits import evaluation_mode

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TaskDict = dict[str, dict[str, Any]]
_PARTS = ("tasks", "groups", "group_map")


class TaskError(ValueError):
    """A task that does not exist, or whose data cannot be had."""


def load_tasks(names: Sequence[str], folder: str | Path | None = None) -> TaskDict:
    """Tasks and groups of tasks with their data, which is fetched where it is not in the cache of ``datasets``.

    Args:
        names: of lm-eval's tasks, groups or tags.
        folder: with task files (YAML) of your own; their names come first.

    Returns:
        "tasks", "groups" and "group_map" of lm-eval's objects, for :func:`run_tasks`.

    Raises:
        ImportError: lm-eval is not installed.
        TaskError: no name, an unknown one, or data that cannot be fetched (no network and not in the cache).
    """
    if not names:
        raise TaskError("no task is named")
    if folder is not None and not Path(folder).is_dir():
        raise TaskError(f"there is no folder {str(folder)!r} with task files")
    with _quiet():
        manager = _manager(names, folder)
        loaded = [_load(manager, name) for name in names]
    return {part: {name: value for found in loaded for name, value in found[part].items()} for part in _PARTS}


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: TaskDict,
    *,
    limit: int | None = None,
    shots: int | None = None,
    batch_size: int = 1,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Run tasks on a causal language model, quantized or not, where it is and as it is.

    Args:
        tasks: of :func:`load_tasks`; they may be run on several models.
        limit: examples of each task, the first ones; None for all.
        shots: solved examples before each question; None for each task's own number. Tasks that ask for none get none.
        batch_size: sequences at once.
        seed: of the choice of solved examples.

    Returns:
        Task or group -> "metrics" (name -> "value" and, where lm-eval gives one, "standard_error"), "samples", "shots"
        and "version".

    Raises:
        ImportError: lm-eval is not installed.
        ValueError: a limit, number of shots or batch size below what can be, or a task that the model cannot do.
    """
    for name, value, least in (("limit", limit, 1), ("shots", shots, 0), ("batch_size", batch_size, 1)):
        if value is not None and (type(value) is not int or value < least):
            raise ValueError(f"{name} must be a whole number of at least {least}, not {value!r}")
    lm_eval = _import()
    from lm_eval.models.huggingface import HFLM

    with _quiet(), evaluation_mode(model):
        # it gives the tokenizer a token to pad with
        adapter = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), backend="causal", batch_size=batch_size)
        with _prepared(tasks["tasks"], shots, seed):  # not simple_evaluate, which describes the machine for a minute
            found = lm_eval.evaluate(lm=adapter, task_dict=tasks, limit=limit, log_samples=False, bootstrap_iters=1000)
    return {name: _summary(name, values, found) for name, values in found["results"].items()}


def _import() -> Any:
    try:
        import lm_eval
    except ImportError:
        raise ImportError('tasks are run by lm-eval: pip install "hf_lowbit[lm-eval]"') from None
    return lm_eval


def _manager(names: Sequence[str], folder: str | Path | None) -> Any:
    """An index that has all the names; that of lm-eval's own tasks takes some seconds to make."""
    _import()
    from lm_eval.tasks import TaskManager

    path = None if folder is None else str(folder)
    if path is not None:
        manager = TaskManager(include_path=path, include_defaults=False)
        if set(names) <= set(manager.all_tasks):
            return manager
    manager = TaskManager(include_path=path)
    if unknown := [name for name in names if name not in manager.all_tasks]:
        raise TaskError(f"lm-eval has no task {', '.join(unknown)}; `lm-eval ls tasks` lists them")
    return manager


def _load(manager: Any, name: str) -> TaskDict:
    try:
        return manager.load([name])
    except Exception as error:  # of datasets, of the Hub's client or of the task's own code
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise TaskError(
            f"the data of the task {name!r} cannot be loaded: {first} ({type(error).__name__}). Without a "
            "network it must be in the cache of datasets (HF_HOME) from an earlier run"
        ) from error


@contextmanager
def _prepared(tasks: dict[str, Any], shots: int | None, seed: int) -> Iterator[None]:
    """Each with its number of solved examples and their seed, as lm-eval's command sets them; then as it was."""
    before = {name: task.get_config("num_fewshot") for name, task in tasks.items()}
    try:
        for name, task in tasks.items():
            own = before[name]
            task.set_config(key="num_fewshot", value=(own or 0) if own == 0 or shots is None else shots)
            task.set_fewshot_seed(seed=seed)
        yield
    finally:
        for name, task in tasks.items():
            task.set_config(key="num_fewshot", value=before[name])


def _summary(name: str, values: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    metrics: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        metric, _, filtered = key.partition(",")
        if not filtered or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = values.get(f"{metric}_stderr,{filtered}")
        label = metric if filtered == "none" else f"{metric} ({filtered})"
        metrics[label] = {"value": float(value)}
        if isinstance(error, int | float):
            metrics[label]["standard_error"] = float(error)
    return {
        "metrics": metrics,
        "samples": found.get("n-samples", {}).get(name, {}).get("effective"),
        "shots": found.get("n-shot", {}).get(name),
        "version": found.get("versions", {}).get(name),
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval's log says much that is not for our users."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
