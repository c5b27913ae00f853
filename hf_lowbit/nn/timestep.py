"""The timestep at which a diffusion model is called, for layers with scales of each timestep.

A layer sees its input alone. The model that holds it is told the timestep; while it runs, a context variable has it.
What sets the variable takes the place of the model's ``forward``, for PEFT's wrappers call that, past every hook. It is
plain data: copies and pickles of the model have it, and it reaches their own class' ``forward``.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from hf_lowbit.nn.graphs import outside_graphs

ARGUMENT = "timestep"  # of the models' forward


class UnknownTimestepError(RuntimeError):
    """A layer with scales of each timestep is called, and nobody has said at which."""


class Timestep:
    """Those of the samples of a batch.

    Args:
        values: a number, or a tensor of one or of as many as there are samples.
    """

    def __init__(self, values: Any) -> None:
        self.values = torch.as_tensor(values).detach().reshape(-1).to("cpu", torch.float64)
        self._nearest: dict[tuple[float, ...], int | Tensor] = {}

    def nearest(self, timesteps: tuple[float, ...]) -> int | Tensor:
        """Index of the nearest of ``timesteps``, which fall; of two, the larger. int64 ``[samples]`` or one for all."""
        index = self._nearest.get(timesteps)
        if index is None:
            table = torch.tensor(timesteps, dtype=torch.float64)
            each = (self.values.unsqueeze(-1) - table).abs().argmin(-1)
            index = int(each[0]) if bool((each == each[0]).all()) else each
            self._nearest[timesteps] = index
        return index

    def rows(self, timesteps: tuple[float, ...], size: int) -> int | Tensor:
        """:meth:`nearest` for each entry of an input's first dimension, in which a sample may have several.

        Raises:
            ValueError: it is no multiple of the samples, which differ.
        """
        index = self.nearest(timesteps)
        if isinstance(index, int) or len(index) == size:
            return index
        if size % len(index):
            raise ValueError(
                f"the timesteps of {len(index)} samples differ, and an input of {size} rows is no multiple of them: "
                "call the model with samples of one timestep"
            )
        return index.repeat_interleave(size // len(index))


_current: ContextVar[Timestep | None] = ContextVar("hf_lowbit_timestep", default=None)
_latest: Timestep | None = None  # of the last forward that is to have a backward


def current_timestep() -> Timestep | None:
    """The timestep of the model that is running; None if there is none.

    Within a backward it is that of the last forward: gradient checkpointing runs blocks once more there, in a thread of
    autograd's own where there is one.
    """
    found = _current.get()
    return _latest if found is None and torch._C._current_graph_task_id() != -1 else found


@contextmanager
def at_timestep(values: Any) -> Iterator[None]:
    """Within it layers are called at this timestep: to run parts of a model by themselves. None: at none."""
    global _latest
    timestep = None if values is None else Timestep(values)
    if torch.is_grad_enabled():
        _latest = timestep
    token = _current.set(timestep)
    try:
        yield
    finally:
        _current.reset(token)


@outside_graphs
def rows_now(timesteps: tuple[float, ...], size: int) -> int | Tensor:
    """:meth:`Timestep.rows` of the model that is running. Raises UnknownTimestepError where none is."""
    timestep = current_timestep()
    if timestep is None:
        raise UnknownTimestepError(
            "a layer whose inputs have scales of each timestep is called at an unknown one: call the model that holds "
            "it, with its timestep, or use hf_lowbit.nn.timestep.at_timestep"
        )
    return timestep.rows(timesteps, size)


def timestep_position(model: nn.Module) -> int | None:
    """Position of the argument that tells a model its timestep; None if it takes none."""
    names = list(inspect.signature(type(model).forward).parameters)[1:]
    return names.index(ARGUMENT) if ARGUMENT in names else None


class _TimedForward:
    """``forward`` of a model with layers that need its timestep."""

    def __init__(self, model: nn.Module, position: int) -> None:
        self._model, self._position = model, position
        self._own = model.__dict__.get("forward")  # where another library has put one

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._own or MethodType(type(self._model).forward, self._model))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        values = args[self._position] if len(args) > self._position else kwargs.get(ARGUMENT)
        with at_timestep(values):
            if self._own is not None:
                return self._own(*args, **kwargs)
            return type(self._model).forward(self._model, *args, **kwargs)


def attach_timestep(model: nn.Module, always: bool = False) -> None:
    """Have a model that is told its timestep tell its layers, if any of them needs it, or ``always``."""
    position = timestep_position(model)
    if position is None or isinstance(model.__dict__.get("forward"), _TimedForward):
        return
    if always or any(_needs_timestep(module) for module in model.modules()):
        model.forward = _TimedForward(model, position)


def detach_timestep(model: nn.Module) -> None:
    """Undo :func:`attach_timestep`."""
    forward = model.__dict__.get("forward")
    if isinstance(forward, _TimedForward):
        del model.forward
        if forward._own is not None:
            model.forward = forward._own


def _needs_timestep(module: nn.Module) -> bool:
    activation = getattr(getattr(module, "layer_spec", None), "activation", None)
    return activation is not None and activation.timesteps is not None
