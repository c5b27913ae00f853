"""What a float model predicts, kept so that its quantized self can be compared with it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from hf_lowbit.calibration.heap import alone
from hf_lowbit.calibration.inspected import first_output
from hf_lowbit.calibration.store import TensorStore
from hf_lowbit.calibration.units import Batch

_CHUNK_TOKENS = 64


class Piece(NamedTuple):
    """Some samples of a batch."""

    batch: int
    samples: slice


class _Divergence(torch.autograd.Function):
    """Sum over tokens of weight * KL(head(kept) || logits), float32; its gradient is found on the way.

    In chunks of tokens: a large vocabulary's probabilities take more memory than the rest of a small model.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, kept: Tensor, weights: Tensor, head: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        flat, read, shares = logits.flatten(0, -2), kept.flatten(0, -2), weights.flatten()
        gradient = torch.empty_like(flat) if ctx.needs_input_grad[0] else None
        loss = torch.zeros((), device=logits.device)
        for start in range(0, len(flat), _CHUNK_TOKENS):
            part = slice(start, start + _CHUNK_TOKENS)
            dtype = head.dtype if torch.is_autocast_enabled(head.device.type) else torch.float32
            shift = None if bias is None else bias.to(dtype)
            expected = F.linear(read[part].to(dtype), head.to(dtype), shift)
            right, mine = (each.float().log_softmax(-1) for each in (expected, flat[part]))
            share, probability = shares[part, None], right.exp()
            loss += right.sub_(mine).mul_(probability).mul_(share).sum()
            if gradient is not None:
                gradient[part] = mine.exp_().sub_(probability).mul_(share)
        if gradient is not None:
            ctx.save_for_backward(gradient.reshape(logits.shape))
        return loss

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(gradients[0]), None, None, None, None  # in place: it is as large as the logits


class Predictions:
    """A float model's predictions on batches, and how far those of the same model, now quantized, are from them.

    A model with an output head is compared by KL(float || quantized) of the head's distributions, in nats per token;
    what is kept is the head's input, which is far smaller, and the float head. Another model is compared by the mean
    squared error of its first floating output, relative to that output's mean square.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Batch], store: TensorStore) -> None:
        """Args:
        model: float. Its head's values must not be changed in place afterwards.
        batches: keyword arguments of its forward, on its device.
        store: where its predictions are kept.
        """
        self._batches, self._store = list(batches), store
        head = _head_of(model)
        parameters = [] if head is None else [p for p in (head.weight, head.bias) if isinstance(p, Tensor)]
        for parameter in parameters:
            parameter.data = alone(parameter.data)  # the model's own, too: it need not be there twice
        self._head = None if head is None else [parameter.data for parameter in parameters]
        self._kept, self._sizes = [], []
        for batch in self._batches:
            size = samples_of(batch)
            parts = []
            for index in range(size):  # one by one: the logits of a batch would take more memory than all the rest
                with torch.no_grad(), _calls(head) as calls:
                    output = model(**part_of(batch, size, slice(index, index + 1)))
                parts.append(prediction_of(output) if head is None else calls[-1][0])
            self._kept.append(store.put(torch.cat(parts)))
            self._sizes.append(size)

    def pieces(self, samples: int) -> list[Piece]:
        """All batches, in pieces of at most that many samples."""
        return [
            Piece(batch, slice(start, min(start + samples, size)))
            for batch, size in enumerate(self._sizes)
            for start in range(0, size, samples)
        ]

    def parts(self, piece: Piece) -> list[tuple[Piece, float]]:
        """A piece sample by sample, with weights by which the parts' losses add up to the piece's.

        Only divergences add up: the other loss is one of the whole piece.
        """
        if self._head is None:
            return [(piece, 1.0)]
        found = [Piece(piece.batch, slice(i, i + 1)) for i in range(piece.samples.start, piece.samples.stop)]
        tokens = [self._tokens(part) for part in found]
        return [(part, count / max(1.0, sum(tokens))) for part, count in zip(found, tokens, strict=True)]

    def _tokens(self, piece: Piece) -> float:
        kept = self._store.get(self._kept[piece.batch])[piece.samples]
        mask = self._cut(piece).get("attention_mask")
        counts = isinstance(mask, Tensor) and mask.shape == kept.shape[:-1]
        return float(mask.sum()) if counts and isinstance(mask, Tensor) else float(kept.shape[:-1].numel())

    def loss(self, model: nn.Module, piece: Piece) -> Tensor:
        """How far the model's predictions are, mean over the piece's tokens (those that its mask leaves)."""
        batch = self._cut(piece)
        head = None if self._head is None else _head_of(model)
        with _calls(head) as calls:
            output = model(**batch)
        kept = self._store.get(self._kept[piece.batch])[piece.samples]
        if self._head is None:
            mine = prediction_of(output).float()
            expected: Tensor = kept.to(mine.device, torch.float32)
            return F.mse_loss(mine, expected) / expected.square().mean()
        logits = calls[-1][1]
        weights, mask = torch.ones(logits.shape[:-1], device=logits.device), batch.get("attention_mask")
        if isinstance(mask, Tensor) and mask.shape == weights.shape:
            weights = mask.float()
        weights = weights / weights.sum().clamp(min=1)
        loss: Tensor = _Divergence.apply(logits, kept.to(logits.device), weights, *self._head)
        return loss

    def _cut(self, piece: Piece) -> Batch:
        return part_of(self._batches[piece.batch], self._sizes[piece.batch], piece.samples)


def samples_of(batch: Batch) -> int:
    """How many, by the first tensor that has tokens or channels beside them."""
    tensors = [value for value in batch.values() if isinstance(value, Tensor) and value.dim()]
    return len(next((tensor for tensor in tensors if tensor.dim() > 1), tensors[0]))


def part_of(batch: Batch, size: int, samples: slice) -> Batch:
    """Some of the samples of a batch of ``size``."""
    part: Batch = tree_map(
        lambda value: value[samples] if isinstance(value, Tensor) and value.dim() and len(value) == size else value,
        dict(batch),
    )
    return part


def _head_of(model: nn.Module) -> Any:
    """The output head, if there is a linear one."""
    get: Any = getattr(model, "get_output_embeddings", None)
    head = None if get is None else get()
    return head if isinstance(head, nn.Linear) else None


@contextmanager
def _calls(module: nn.Module | None) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """(input, output) of each call of a module within the context."""
    calls: list[tuple[Tensor, Tensor]] = []
    if module is None:
        yield calls
        return
    handle = module.register_forward_hook(lambda m, args, output: calls.append((args[0], output)))
    try:
        yield calls
    finally:
        handle.remove()


def prediction_of(output: Any) -> Tensor:
    """The first floating tensor of what a whole model returned."""
    return first_output(output if isinstance(output, Tensor | tuple) else dict(output))
