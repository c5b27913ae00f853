"""Token ids, taken as they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_lowbit.calibration.data.limits import check_ids, check_length, require_language_model
from hf_lowbit.calibration.data.request import Request, batch_rows
from hf_lowbit.calibration.data.result import CalibrationData, DataError, to_result
from hf_lowbit.calibration.data.text import cut


def from_ids(ids: Any, request: Request) -> CalibrationData:
    """A tensor, array or list of ids: [n, length] has n samples; [length] is cut into windows of ``sequence_length``.

    Raises:
        DataError: another number of dimensions, no integers, or anything that `from_rows` refuses.
    """
    require_language_model(request.model, "token ids")
    tensor = to_ids(ids, "the data")
    if tensor.numel():
        check_ids(tensor, request.model, "the data")
    if tensor.dim() == 2:
        return from_rows(tensor, request, f"tensor of token ids {list(tensor.shape)}")
    if tensor.dim() != 1:
        raise DataError(f"token ids have one or two dimensions, not the shape {list(tensor.shape)}")
    unit = f"windows of {request.sequence_length} tokens"
    remedy = "give more tokens, or lower num_samples or sequence_length"
    return from_rows(cut(tensor, request.sequence_length), request, f"{len(tensor)} token ids", unit, remedy)


def from_rows(
    rows: Sequence[Any] | Tensor,
    request: Request,
    description: str,
    unit: str = "sequences",
    remedy: str = "give more, or lower num_samples",
) -> CalibrationData:
    """One sample a row, drawn by the seed; of longer ones the first ``sequence_length`` tokens. Nothing is added.

    Args:
        rows: [n, length], or n sequences of any lengths, each a list of integers or a tensor of one dimension.

    Raises:
        DataError: no language model, too few rows, a row that is empty or no row of ids, ids that the model does not
            know, more tokens than positions.
    """
    require_language_model(request.model, "token ids")
    check_length(request.sequence_length, request.model)
    chosen = []
    for index in request.choose(len(rows), unit, remedy):
        row = to_ids(rows[index], f"sequence {index}")
        if row.dim() != 1 or row.numel() == 0:
            raise DataError(f"sequence {index} has the shape {list(row.shape)}; it must be [length], and not empty")
        check_ids(row, request.model, f"sequence {index}")
        chosen.append(row[: request.sequence_length].clone())
    return to_result(batch_rows(chosen, request.batch_size), description)


def to_ids(value: Any, name: str) -> Tensor:
    """Integers as an int64 tensor on the CPU.

    Raises:
        DataError: anything but integers, or lists of unequal lengths.
    """
    try:
        tensor = value if isinstance(value, Tensor) else torch.tensor(np.asarray(value))
    except (TypeError, ValueError) as error:
        raise DataError(f"{name} holds no token ids: {error}") from None
    if tensor.numel() and (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool):
        raise DataError(f"{name} holds {tensor.dtype}; token ids are integers, and recordings come in a list")
    return tensor.detach().to("cpu", torch.int64)
