"""Batches of model inputs that the user made, such as those of a DataLoader."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from hf_lowbit.calibration.data.limits import check_ids, check_length
from hf_lowbit.calibration.data.request import Request
from hf_lowbit.calibration.data.result import Batch, CalibrationData, DataError, to_result

_IDS = ("input_ids", "decoder_input_ids")


_TIMESTEP = "timestep"  # of diffusers' denoisers


def from_batches(batches: Iterable[Any], request: Request, description: str) -> CalibrationData:
    """The first ``num_samples`` samples of dicts of tensors, as they are batched; "labels" are dropped.

    A tensor alone, or alone in a list or tuple, is taken as "input_ids". No more is read than is needed, so that an
    endless source will do; ``sequence_length``, ``seed`` and ``batch_size`` have no say. The arguments of a denoiser,
    which has a "timestep", may be dicts of tensors, and tensors of another first dimension, such as Flux's positions,
    which belong to all samples; a timestep that is one number is that of every sample.

    Raises:
        DataError: no batches or too few samples, no dicts of tensors, no common leading dimension, arguments that the
            model's forward does not have, ids that the model does not know.
    """
    taken: list[Batch] = []
    missing = request.num_samples
    for index, element in enumerate(batches):
        batch = _to_batch(element, f"batch {index}", request.model)
        size = _samples(batch)
        taken.append(tree_map(partial(_first, size=size, count=missing), batch))
        missing -= min(size, missing)
        if missing == 0:
            return to_result(taken, description)
    if not taken:
        raise DataError("the data yields no batch; if it is an iterator, it may have been used up")
    found = request.num_samples - missing
    raise DataError(
        f"the data holds {found} samples; num_samples={request.num_samples}: give more, or lower num_samples"
    )


def _samples(batch: Batch) -> int:
    """How many, by the first tensor that has tokens or channels beside them."""
    tensors = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
    return len(next((tensor for tensor in tensors if tensor.dim() > 1), tensors[0]))


def _first(value: Tensor, size: int, count: int) -> Tensor:
    return value[:count].clone() if len(value) == size else value.clone()


def _to_batch(element: Any, name: str, model: Any) -> Batch:
    """Detached tensors on the CPU, of equal size in the first dimension."""
    if isinstance(element, list | tuple) and len(element) == 1:
        (element,) = element
    if isinstance(element, Tensor):
        element = {"input_ids": element}
    if not isinstance(element, Mapping):
        raise DataError(f"{name} is a {type(element).__name__}; it must be a dict of tensors, the model's inputs")
    denoiser = _TIMESTEP in element
    batch = {key: _to_cpu(value, f"{name}: {key}", denoiser) for key, value in element.items() if key != "labels"}
    if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(batch)):
        raise DataError(f"{name} holds no inputs")
    if denoiser and batch[_TIMESTEP].dim() == 0:
        if len(batch) == 1:
            raise DataError(f"{name} holds a timestep and nothing else")
        batch[_TIMESTEP] = batch[_TIMESTEP].expand(_samples({k: v for k, v in batch.items() if k != _TIMESTEP}))
    _check_shapes(batch, name)
    _check_arguments(batch, name, model)
    for key in _IDS:
        if key in batch:
            check_ids(batch[key], model, f"{name}: {key}")
    if "input_ids" in batch:
        check_length(batch["input_ids"].shape[1], model, f"{name}: the length")
    return batch


def _to_cpu(value: Any, name: str, denoiser: bool = False) -> Any:
    if denoiser and isinstance(value, Mapping):
        return {key: _to_cpu(item, f"{name}.{key}", denoiser) for key, item in value.items()}
    if denoiser and isinstance(value, int | float) and not isinstance(value, bool):
        value = torch.tensor(value)
    if not isinstance(value, Tensor):
        raise DataError(f"{name} is a {type(value).__name__}; it must be a tensor (return_tensors='pt' of a tokenizer)")
    integer = not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
    return value.detach().to("cpu", torch.int64 if integer else value.dtype)


def _check_shapes(batch: Batch, name: str) -> None:
    tensors = {key: value for key, value in batch.items() if isinstance(value, Tensor)}
    for key, tensor in tensors.items():
        if tensor.dim() == 0 or tensor.numel() == 0 or (key in _IDS and tensor.dim() != 2):
            raise DataError(
                f"{name}: {key} has the shape {list(tensor.shape)}; a batch is [samples, ...], as a DataLoader makes it"
            )
        if key in _IDS and (tensor.is_floating_point() or tensor.dtype == torch.bool):
            raise DataError(f"{name}: {key} is {tensor.dtype}; token ids are integers")
    alike = tensors
    if _TIMESTEP in batch:
        first = next((key for key, tensor in tensors.items() if tensor.dim() > 1), _TIMESTEP)
        alike = {key: tensors[key] for key in (first, _TIMESTEP)}
    if len({len(tensor) for tensor in alike.values()}) > 1:
        sizes = ", ".join(f"{key} {list(tensor.shape)}" for key, tensor in alike.items())
        raise DataError(f"{name}: the tensors differ in the first dimension, the number of samples: {sizes}")


def _check_arguments(batch: Batch, name: str, model: Any) -> None:
    """Only what is certain: a forward with ``**kwargs`` says nothing about what it takes."""
    parameters = inspect.signature(model.forward).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    unknown = [key for key in batch if key not in parameters]
    if unknown:
        raise DataError(
            f"{name}: {type(model).__name__} takes no argument {', '.join(map(repr, unknown))}; leave it out"
        )
