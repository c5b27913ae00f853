"""Recorded calls of a model: its arguments in files, which are read one at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import torch
from torch import Tensor

from hf_lowbit.calibration.checkpoint import Checkpoint
from hf_lowbit.calibration.data.result import CalibrationData, DataError

_PLAIN = (str, int, float, bool, type(None))


@dataclass(frozen=True, eq=False)
class RecordedBatches(Sequence[dict[str, Any]]):
    """Keyword arguments of a model's forward, as something called it.

    Attributes:
        files: where they are.
        names: of the batches in ``files``.
        description: where they come from.
        fingerprint: sha256 of their tensors.
        samples: in all batches.
        facts: for the config's provenance.
    """

    files: Checkpoint
    names: Sequence[str]
    description: str
    fingerprint: str
    samples: int
    facts: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, index: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        found = self.files.load(self.names[index])
        if found is None:
            raise DataError(
                f"a recorded batch is missing in {self.files.folder}: it was deleted or damaged meanwhile; run again"
            )
        arguments: dict[str, Any] = _put_together(found[1]["arguments"], found[0])
        return arguments

    def to_data(self) -> CalibrationData:
        """As the engine takes it."""
        return CalibrationData(self, self.description, None, self.fingerprint, self.samples, self.facts)


def save_batch(files: Checkpoint, name: str, arguments: Mapping[str, Any]) -> str:
    """Write one call's arguments: tensors and plain values, in dictionaries, lists and tuples of any depth.

    Returns:
        sha256 of the tensors.

    Raises:
        DataError: anything else among them.
    """
    tensors: dict[str, Tensor] = {}
    structure = _take_apart(arguments, tensors, "")
    files.save(name, tensors, {"arguments": structure})
    digest = hashlib.sha256()
    for tensor in tensors.values():
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _take_apart(value: Any, tensors: dict[str, Tensor], path: str) -> Any:
    """The structure as JSON holds it; tensors move to ``tensors``, each in memory of its own."""
    if isinstance(value, Tensor):
        tensors[path] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"tensor": path}
    if isinstance(value, Mapping):
        return {"dict": {key: _take_apart(item, tensors, f"{path}.{key}") for key, item in value.items()}}
    if isinstance(value, list | tuple):
        items = [_take_apart(item, tensors, f"{path}.{index}") for index, item in enumerate(value)]
        return {"tuple" if isinstance(value, tuple) else "list": items}
    if isinstance(value, _PLAIN):
        return {"value": value}
    raise DataError(f"the argument {path.lstrip('.')} is a {type(value).__name__}, which cannot be recorded")


def _put_together(structure: dict[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    ((kind, content),) = structure.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _put_together(item, tensors) for key, item in content.items()}
    if kind == "value":
        return content
    items = [_put_together(item, tensors) for item in content]
    return tuple(items) if kind == "tuple" else items
