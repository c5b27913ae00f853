"""Placement: which device blocks are computed on, and where their weights are while they are not.

A model that lies on another device than the one that computes is never there as a whole. Blocks come one at a time and
go back packed; what stands around them (embeddings, norms, heads) is lent for the length of a forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_lowbit.calibration.forwards import replaced_forwards
from hf_lowbit.calibration.stacks import find_stacks
from hf_lowbit.calibration.store import TensorStore


class PlacementError(ValueError):
    """A device that is not there, or blocks whose weights cannot be had; the message says which."""


@dataclass(frozen=True)
class BlockWeights:
    """The weights of blocks that are on the meta device: read, or made, whenever a block is reached.

    Each block is asked for twice in a run, once to see how the model calls it and once to quantize it, and must be the
    same each time.

    Attributes:
        read: name of a block, one of the members of the model's lists of blocks -> its parameters and buffers by their
            names within it, of the block's shapes; of any device, in any floating type.
        fingerprint: of all that decides the values, such as a seed or the files' hashes. A killed run resumes only
            with the same.
    """

    read: Callable[[str], Mapping[str, Tensor]]
    fingerprint: str


class Placement:
    """Where one model is calibrated.

    Attributes:
        device: of everything that is computed.
        host: of the model's own tensors.
        blocks: names of the modules that come and go: members of the outermost lists that hold planned layers.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Iterable[str],
        device: torch.device | None = None,
        weights: BlockWeights | None = None,
    ) -> None:
        """``device``: of :func:`as_device`; None for where the model is.

        Raises:
            PlacementError: a tensor on the meta device that ``weights`` is not asked for.
        """
        self.blocks = [block for stack in find_stacks(model, list(layers)) for block in stack.blocks]
        self.host = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
        self.device, self._weights = self.host if device is None else device, weights
        if weights is not None:
            inside = _tensors_below(model.get_submodule(block) for block in self.blocks)
            absent = [name for name, t in _named_tensors(model) if t.is_meta and id(t) not in inside]
            if absent:
                raise PlacementError(f"{absent[0]} is on the meta device, and in no block: only blocks are made later")

    @property
    def moves(self) -> bool:
        """Whether blocks come and go."""
        return self.device != self.host or self._weights is not None

    def store(self, limit: int | None, folder: Path | None) -> TensorStore:
        """For activations: on the host, where the model is there too."""
        return TensorStore(limit, folder, self.device if self.device != self.host else None)

    def replay_limit(self, limit: int | None) -> int | None:
        """Bytes of outputs that :class:`hf_lowbit.calibration.replay.Replay` may keep; none where they would fill the
        device that the model is kept away from.
        """
        return 0 if self.moves else None if limit is None else limit // 4

    @contextmanager
    def at_hand(self, name: str, module: nn.Module) -> Iterator[Callable[[nn.Module], None]]:
        """Within it a block or layer is on the device. It is told which module has taken the block's place, and that is
        where the model is afterwards.

        What the float layers held that are no longer in it is what it was before: whoever keeps them to undo the run
        keeps nothing on the device, and no float32 copies.
        """
        kept = [(owner, key, tensor, tensor.data) for owner in module.modules() for key, tensor in _own_tensors(owner)]
        result = [module]
        try:
            self._fill(name, module)
            if self.device != self.host:
                module.to(self.device)
            yield result.append
        except BaseException:
            for owner, key, tensor, data in kept:
                _place(owner, key, tensor)
                tensor.data = data
            raise
        held = {id(part) for part in result[-1].modules()}
        live = {id(tensor) for _, tensor in _named_tensors(result[-1])}
        if self.device != self.host:
            result[-1].to(self.host)
        for owner, key, tensor, data in kept:
            if id(owner) not in held:
                _place(owner, key, tensor)
            if id(tensor) not in live:
                tensor.data = data

    @contextmanager
    def computing(self, model: nn.Module) -> Iterator[None]:
        """Within it the forwards of a model (this one, or a copy) run on the device; after it, it is as it was."""
        if not self.moves:
            yield
            return
        modules = {name: model.get_submodule(name) for name in self.blocks}
        inside = _tensors_below(modules.values())
        around = [tensor for _, tensor in _named_tensors(model) if id(tensor) not in inside]
        with ExitStack() as back:
            back.callback(self._bring_home, model)  # buffers that the forwards have replaced
            back.enter_context(_lent(around, self.device))
            coming = {module: self._coming_and_going(name, module) for name, module in modules.items()}
            back.enter_context(replaced_forwards(coming))
            yield

    def _coming_and_going(self, name: str, module: nn.Module) -> Callable[..., Any]:
        """The forward of a block that is on the device while it runs."""
        forward = module.forward

        def come_and_go(*args: Any, **kwargs: Any) -> Any:
            places = [(m, key, p) for m in module.modules() for key, p in _own_tensors(m)]
            self._fill(name, module)
            try:
                with _lent([tensor for _, tensor in _named_tensors(module)], self.device):
                    return forward(*args, **kwargs)
            finally:
                for owner, key, tensor in places:
                    if tensor.is_meta:
                        _place(owner, key, tensor)

        return come_and_go

    def _fill(self, name: str, module: nn.Module) -> None:
        """Put the weights of a block on the meta device into their places.

        Raises:
            PlacementError: there are none, or others than the block's.
        """
        wanted = {key: tensor for key, tensor in _named_tensors(module) if tensor.is_meta}
        if not wanted:
            return
        if self._weights is None or name not in self.blocks:
            raise PlacementError(f"{name}.{next(iter(wanted))} is on the meta device: load the model whole")
        found = self._weights.read(name)
        for key, tensor in wanted.items():
            if key not in found or found[key].shape != tensor.shape:
                what = f"of shape {tuple(found[key].shape)}" if key in found else "missing"
                raise PlacementError(f"the weights of {name}: {key} {tuple(tensor.shape)} is {what}")
            filled = found[key].detach().to(self.device, tensor.dtype)
            owner, _, leaf = key.rpartition(".")
            is_parameter = isinstance(tensor, nn.Parameter)
            _place(module.get_submodule(owner), leaf, nn.Parameter(filled, False) if is_parameter else filled)

    def _bring_home(self, model: nn.Module) -> None:
        for _, tensor in _named_tensors(model):
            if tensor.device == self.device != self.host:
                tensor.data = tensor.data.to(self.host)


def as_device(device: str | torch.device | None) -> torch.device | None:
    """A device to calibrate on, with its number; None stays None.

    Raises:
        PlacementError: it is none that computes, or not in this machine.
    """
    if device is None:
        return None
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as problem:
        raise PlacementError(f"device={device!r} is no device of torch's: {str(problem).splitlines()[0]}") from None
    if chosen.type == "cpu":
        return torch.device("cpu")
    if chosen.type != "cuda":
        raise PlacementError(f"device={device!r}: calibration runs on 'cpu' and 'cuda'")
    if not torch.cuda.is_available():
        raise PlacementError(f"device={device!r}: torch finds no GPU here; leave device out to calibrate on the CPU")
    index = torch.cuda.current_device() if chosen.index is None else chosen.index
    if index >= torch.cuda.device_count():
        raise PlacementError(f"device={device!r}: there are {torch.cuda.device_count()} GPUs, counted from 0")
    return torch.device("cuda", index)


@contextmanager
def _lent(tensors: Iterable[Tensor], device: torch.device) -> Iterator[None]:
    """Tensors are on the device within it, and after it what they were."""
    kept = [(tensor, tensor.data) for tensor in tensors if tensor.device != device and not tensor.is_meta]
    try:
        for tensor, data in kept:
            tensor.data = data.to(device)
        yield
    finally:
        for tensor, data in kept:
            tensor.data = data


def _own_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    held = (*module._parameters.items(), *module._buffers.items())
    return [(name, tensor) for name, tensor in held if tensor is not None]


def _named_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]


def _tensors_below(modules: Iterable[nn.Module]) -> set[int]:
    return {id(tensor) for module in modules for _, tensor in _named_tensors(module)}


def _place(owner: nn.Module, name: str, tensor: Tensor) -> None:
    held = owner._parameters if name in owner._parameters else owner._buffers
    held[name] = tensor  # type: ignore[assignment]
