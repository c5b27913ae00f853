"""Calibration data of a pipeline: what its denoisers are called with while it draws pictures from noise.

The pipeline runs as its user runs it, with its own scheduler and guidance; a hook on each denoiser records the
arguments (Q-Diffusion, arXiv 2302.04304: samples of all timesteps). No class per pipeline.
"""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from hf_lowbit.calibration.checkpoint import Checkpoint, fingerprint_of, unshared
from hf_lowbit.calibration.data import DataError
from hf_lowbit.calibration.data.recorded import RecordedBatches, save_batch
from hf_lowbit.calibration.data.running import dropout_off
from hf_lowbit.calibration.parallel import processes, rank, wait_for_all
from hf_lowbit.calibration.progress import duration
from hf_lowbit.config import ConfigError
from hf_lowbit.integrations.finish import library_versions
from hf_lowbit.integrations.prompts import Prompts, joined

logger = logging.getLogger("hf_lowbit")

_TIMESTEP = "timestep"


@torch.no_grad()
def record_trajectories(
    pipeline: Any,
    components: Sequence[str],
    prompts: Prompts,
    pictures: int,
    seed: int,
    folder: Path,
    resume: bool = True,
    own_folder: bool = True,
) -> tuple[dict[str, RecordedBatches], Checkpoint]:
    """Draw pictures, and record the arguments of the named components at the chosen steps.

    A batch is one call: samples of one timestep, conditional and unconditional ones where guidance runs them together;
    "timestep" is a tensor ``[samples]``. The i-th picture starts from the noise of seed + i, whatever it is drawn with.

    Args:
        pipeline: of diffusers; it is left as any call leaves it.
        components: names of its models.
        pictures: how many; prompts are taken in turn.
        folder: where the batches are written as they come; those of an earlier run that was killed are kept.
        own_folder: ``folder`` belongs to this run alone; else one below it, of the fingerprint's name, is used.

    Returns:
        Component -> its batches; what to ``finish()`` once they are needed no more.

    Raises:
        ConfigError: prompts or arguments that the pipeline does not take, or a component that it does not call.
        DataError: values that are not finite.
        ResumeError: the folder holds another run's, or cannot be written.
    """
    calls = prompts.calls(pipeline, pictures)
    facts = prompts.facts(pipeline, pictures)
    if rank() != 0:
        wait_for_all()  # the first process draws for all
    request = {**prompts.request(), **facts, "seed": seed, "components": list(components)}
    files = _open(pipeline, request, folder, resume, own_folder)
    try:
        marks = _draw(pipeline, components, prompts, calls, seed, files)
    except BaseException:
        files.leave()
        raise
    if rank() == 0:
        wait_for_all()
    found = {name: _collected(name, files, marks, facts) for name in components}
    return found, files


def _open(pipeline: Any, facts: dict[str, Any], folder: Path, resume: bool, own_folder: bool) -> Checkpoint:
    models = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    facts = {
        **facts,
        "pipeline": type(pipeline).__name__,
        "scheduler": dict(getattr(getattr(pipeline, "scheduler", None), "config", {})),
        "threads": torch.get_num_threads(),
        "devices": {name: str(next((p.device for p in model.parameters()), "")) for name, model in models.items()},
        "versions": library_versions(),
    }
    tensors = (
        (f"{name}.{key}", value)
        for name, model in models.items()
        for key, value in model.state_dict().items()
        if isinstance(value, Tensor)
    )
    fingerprint, lock = fingerprint_of(tensors, facts), None
    if not own_folder:
        folder = folder / f"trajectories-{fingerprint[:24]}"
        if processes() == 1:
            folder, lock = unshared(folder)
    return Checkpoint(folder, fingerprint, resume or rank() != 0, lock)


def _draw(
    pipeline: Any,
    components: Sequence[str],
    prompts: Prompts,
    calls: Sequence[Sequence[Mapping[str, Any]]],
    seed: int,
    files: Checkpoint,
) -> list[dict[str, Any]]:
    """Draw what is not drawn yet; what each drawing recorded."""
    marks: list[dict[str, Any]] = []
    started, drawn, total, first = time.monotonic(), 0, sum(map(len, calls)), 0
    with quiet(pipeline):
        for index, together in enumerate(calls):
            known = files.load(f"drawing {index}")
            if known is None:
                recorder = _Recorder(pipeline, components, prompts, files, index)
                with recorder.listening():
                    pipeline(**_arguments(pipeline, together, seed + first))
                files.save(f"drawing {index}", {}, recorder.mark)
                drawn += len(together)
            first += len(together)
            marks.append(recorder.mark if known is None else known[1])
            spent = time.monotonic() - started
            if known is None:
                left = spent / drawn * (total - first)
                logger.info(
                    "trajectories: %d of %d pictures in %s, %s left", first, total, duration(spent), duration(left)
                )
    if drawn < total:
        logger.info("trajectories: %d of %d pictures are taken from %s", total - drawn, total, files.folder)
    return marks


def _arguments(pipeline: Any, together: Sequence[Mapping[str, Any]], seed: int) -> dict[str, Any]:
    noise = [torch.Generator().manual_seed(seed + index) for index in range(len(together))]
    ours: dict[str, Any] = {"generator": noise, "output_type": "latent"}  # no picture need be decoded
    known = inspect.signature(pipeline.__call__).parameters
    return {**joined(together), **{name: value for name, value in ours.items() if name in known}}


def _collected(
    component: str, files: Checkpoint, marks: Sequence[Mapping[str, Any]], facts: dict[str, Any]
) -> RecordedBatches:
    """One component's batches, those of one timestep after those of an earlier one."""
    entries = [entry for mark in marks for entry in mark["batches"] if entry["component"] == component]
    if not entries:
        raise ConfigError(
            f"the pipeline does not call its component {component} at any recorded step: leave it out of components, "
            "or calibrate it alone with data=batches of its arguments"
        )
    entries = sorted(entries, key=lambda entry: entry["step"])  # stable: drawings keep their order
    fingerprint = fingerprint_of((), {"batches": [entry["sha256"] for entry in entries]})
    times = sorted({entry["timestep"] for entry in entries if entry["timestep"] is not None}, reverse=True)
    samples = sum(entry["samples"] for entry in entries)
    description = f"{len(times)} timesteps of {facts['pictures']} pictures of {facts['prompts']} prompts"
    return RecordedBatches(
        files, [entry["name"] for entry in entries], description, fingerprint, samples,
        {"trajectories": facts, "timesteps": times},
    )  # fmt: skip


class _Recorder:
    """Writes the arguments of the components' calls during one drawing.

    Attributes:
        mark: what was written, once it is complete.
    """

    def __init__(
        self, pipeline: Any, components: Sequence[str], prompts: Prompts, files: Checkpoint, index: int
    ) -> None:
        self._pipeline, self._prompts, self._files, self._index = pipeline, prompts, files, index
        self._models: dict[str, nn.Module] = {name: getattr(pipeline, name) for name in components}
        self._chosen: set[int] | None = None
        self._step = -1
        self._timestep: float | None = None
        self.mark: dict[str, list[dict[str, Any]]] = {"batches": []}

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within it the components' calls are recorded."""
        with ExitStack() as stack:
            for name, model in self._models.items():
                stack.enter_context(dropout_off(model))
                handle = model.register_forward_pre_hook(
                    lambda module, args, kwargs, name=name: self._record(name, module, args, kwargs), with_kwargs=True
                )
                stack.callback(handle.remove)
            yield

    def _record(self, component: str, model: nn.Module, args: Any, kwargs: Any) -> None:
        arguments, samples = _named(model, args, kwargs)
        timestep = _first_value(arguments.get(_TIMESTEP))
        _refuse_not_finite(component, arguments, timestep)
        if not self._is_chosen(timestep):
            return
        name = f"{component} {self._index} {len(self.mark['batches'])}"
        sha256 = save_batch(self._files, name, arguments)
        self.mark["batches"].append(
            {
                "component": component, "name": name, "step": self._step, "timestep": timestep, "samples": samples,
                "sha256": sha256,
            }
        )  # fmt: skip

    def _is_chosen(self, timestep: float | None) -> bool:
        """Whether the step is recorded. A step may call denoisers several times, with one timestep."""
        if timestep is None:
            return True
        if timestep != self._timestep:
            self._step, self._timestep = self._step + 1, timestep
        if self._chosen is None:
            visited = getattr(getattr(self._pipeline, "scheduler", None), "timesteps", None)
            count = len(torch.unique_consecutive(torch.as_tensor(visited))) if visited is not None else 1
            self._chosen = self._prompts.recorded_steps(count)
        return self._step in self._chosen


def _named(model: nn.Module, args: Any, kwargs: Any) -> tuple[dict[str, Any], int]:
    """Keyword arguments of a call, those that are None left out, and how many samples it has."""
    bound = inspect.signature(model.forward).bind_partial(*args, **kwargs)
    arguments: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        if bound.signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            arguments.update(value)
        elif value is not None and name != "return_dict":
            arguments[name] = value
    samples = next((len(value) for key, value in arguments.items() if isinstance(value, Tensor) and value.dim() > 1), 1)
    if _TIMESTEP in arguments:
        timestep = torch.as_tensor(arguments[_TIMESTEP])
        arguments[_TIMESTEP] = timestep if timestep.dim() > 1 else timestep.reshape(-1).expand(samples)
    return arguments, samples


def _first_value(timestep: Any) -> float | None:
    return None if timestep is None else float(torch.as_tensor(timestep).reshape(-1)[0])


def _refuse_not_finite(component: str, arguments: Mapping[str, Any], timestep: float | None) -> None:
    for name, value in arguments.items():
        for leaf in tree_leaves(value):
            if isinstance(leaf, Tensor) and leaf.is_floating_point() and bool((leaf.isnan() | leaf.isposinf()).any()):
                when = "" if timestep is None else f" at timestep {timestep:g}"
                raise DataError(
                    f"{component}: {name} is not finite{when} while the float pipeline draws: it overflows before "
                    "anything is quantized; load it in float32 or bfloat16, or check its weights"
                )


@contextmanager
def quiet(pipeline: Any) -> Iterator[None]:
    """Without the pipeline's own bars: the drawing is reported as a whole."""
    before = getattr(pipeline, "_progress_bar_config", None)
    pipeline.set_progress_bar_config(**{**(before or {}), "disable": True})
    try:
        yield
    finally:
        if before is None:
            del pipeline._progress_bar_config
        else:
            pipeline._progress_bar_config = before
