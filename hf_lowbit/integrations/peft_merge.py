"""The packed tensors of a layer, as merging an adapter changes them and unmerging puts them back."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_lowbit.method import method_of
from hf_lowbit.nn import PackedLinear, PackedModule
from hf_lowbit.state import config_of
from hf_lowbit.tensorwise import Outcome, quantize_parameter


def packed_tensors(packed: PackedModule) -> dict[str, Tensor]:
    """Everything a merge changes. The bias is copied, because PEFT adds to it in place."""
    tensors = {key: getattr(packed, key).data for key in packed.companion_shapes("weight")}
    bias = getattr(packed, "bias", None)
    return tensors if bias is None else {**tensors, "bias": bias.data.clone()}


def restore(packed: PackedModule, tensors: dict[str, Tensor]) -> None:
    """Put :func:`packed_tensors` back."""
    for key, tensor in tensors.items():
        parameter = getattr(packed, key)
        parameter.data = tensor.to(parameter.device, copy=key == "bias")


@torch.no_grad()
def requantize(packed: PackedModule, weight: Tensor) -> None:
    """Pack a float weight in place of the packed one, with the recipe the layer was quantized with.

    Raises:
        ValueError: the layer belongs to no quantized model, or its recipe refuses the weight.
    """
    config = config_of(packed)
    if config is None:
        raise ValueError(
            "this layer's recipe is unknown, so that a merged weight cannot be quantized again: it is not part of a "
            "model that hf_lowbit quantized or loaded"
        )
    parameters = {key: getattr(packed, key) for key in packed.companion_shapes("weight")}
    recipe = method_of(config).make_recipe(config)
    _merge_into_constant(packed, weight)
    quantize_parameter(packed, "weight", weight, recipe, "merged adapter", Outcome())
    for key, parameter in parameters.items():  # the same parameter objects: tied modules follow
        parameter.data = getattr(packed, key).data
        setattr(packed, key, parameter)


def _merge_into_constant(packed: PackedModule, weight: Tensor) -> None:
    """The stored product of a constant token follows the weight: what the merge adds, it adds to the product too."""
    if not packed.layer_spec.constant_token:
        return
    assert isinstance(packed, PackedLinear)
    token, product = (stored.view(torch.float32) for stored in packed.constant_token())
    change = packed.arranged(weight.float() - packed.dequantized())
    packed.set_constant_token(token, product + change @ token)
