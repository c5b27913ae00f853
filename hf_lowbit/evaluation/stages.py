"""Where quality is lost: a language model at four stages of its quantization, each compared with the float model.

- "float": the model that was quantized;
- "transformed": its weights just before they were rounded, in a model that was rewritten as the method does: folded
  scales, rotations, transforms of layers. Exact rewrites cost nothing here; what does cost is not exact (merged
  channels, trained corrections and norms);
- "rounded": the weights that the codes stand for, in float layers: the cost of rounding alone;
- "packed": the model as it runs, with quantized activations and the kernels' arithmetic.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_lowbit.config import LowbitConfig
from hf_lowbit.evaluation.language import held_out_windows, summarize
from hf_lowbit.evaluation.scores import WindowScores, score_windows
from hf_lowbit.integrations.accounts import report
from hf_lowbit.quantization import dequantize, quantize
from hf_lowbit.state import state_of
from hf_lowbit.tensorwise import QuantizationError, keep_float_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

STAGES = ("float", "transformed", "rounded", "packed")


def quantize_for_stages(model: nn.Module, config: LowbitConfig | str, data: Any = None) -> dict[str, Tensor]:
    """Quantize a live model in place, and keep what a packed model no longer has: its weights before rounding.

    Nothing is resumed: finished blocks of an earlier run know only their codes.

    Args:
        config, data: as for :func:`hf_lowbit.quantize`, which says what is raised.

    Returns:
        Full parameter name -> float weight in the original layout, for :func:`evaluate_stages`.
    """
    with keep_float_weights() as weights:
        quantize(model, config, data, resume=False)
    return weights


def evaluate_stages(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    weights: Mapping[str, Tensor] | None = None,
    sequence_length: int = 512,
    max_tokens: int | None = 16384,
    seed: int = 0,
) -> dict[str, Any]:
    """Perplexity, KL and top-1 agreement of each stage; windows and intervals as in `evaluate_language_model`.

    The float model runs beside each of the other stages. One dequantized copy of the model is made, in its type.

    Args:
        model: quantized; it stays as it is.
        reference: the float model that it was made from.
        weights: of :func:`quantize_for_stages`; None leaves out the stage "transformed".

    Returns:
        What `evaluate_language_model` returns for the packed model, and "stages": name -> "perplexity", "intervals"
        and, but for "float", "kl" and "top1_agreement".

    Raises:
        QuantizationError: the model is not quantized, or the weights are another model's.
        ValueError: as `evaluate_language_model`. Both before any forward pass.
        FloatingPointError: NaN or infinite logits.
    """
    if state_of(model) is None:
        raise QuantizationError("the stages are those of a model that hf_lowbit quantized; this one is not quantized")
    windows, facts = held_out_windows(model, reference, tokenizer, text, sequence_length, max_tokens)
    rounded = dequantize(copy.deepcopy(model), _float_type(model))
    if weights is not None:
        _check_weights(model, rounded, weights)
    packed = score_windows(model, windows, reference)
    scores = {"float": _of_reference(packed), "rounded": score_windows(rounded, windows, reference), "packed": packed}
    if weights is not None:
        scores["transformed"] = score_windows(_with_weights(rounded, weights), windows, reference)
    found = {name: summarize(scores[name], seed) for name in STAGES if name in scores}
    kept = ("perplexity", "kl", "top1_agreement", "intervals")
    stages = {name: {key: values[key] for key in kept if key in values} for name, values in found.items()}
    return {**found["packed"], **facts, "stages": stages}


def _of_reference(scores: WindowScores) -> WindowScores:
    """What was measured of the reference on the way."""
    return WindowScores(scores.tokens, {"negative_log_likelihood": scores.sums["reference_negative_log_likelihood"]})


def _float_type(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _check_weights(model: nn.Module, restored: nn.Module, weights: Mapping[str, Tensor]) -> None:
    shared: dict[str, set[str]] = {}  # the names of each packed parameter, which tied layers share
    for layer in report(model).layers:
        shared.setdefault(layer.tied_to or layer.name, set()).add(layer.name)
    known = set().union(*shared.values())
    wrong = {name for name in weights if name not in known or weights[name].shape != restored.get_parameter(name).shape}
    wrong |= {owner for owner, names in shared.items() if names.isdisjoint(weights)}
    if wrong:
        raise QuantizationError(f"the weights are not this model's: {', '.join(sorted(wrong)[:5])} do not fit")


@torch.no_grad()
def _with_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """The dequantized model with the weights as they were before rounding; tied ones are one parameter."""
    for name, weight in weights.items():
        model.get_parameter(name).copy_(weight)
    return model
