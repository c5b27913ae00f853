"""The first token of a sequence as a constant: its product is stored, and the codes never see it.

A causal text encoder gives the begin-of-sequence token the same embedding in every prompt, often tens of times larger
than all others: a scale that covers it erases the prompt. MixDQ (arXiv 2405.17873, section 3.2) computes its keys and
values once, from the float weight. Only what is that token takes the stored product: another first token (a prompt that
is weighted, a trained embedding, zeroed negatives) is multiplied in full precision by the decoded weight.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_lowbit.kernels import packed_linear

if TYPE_CHECKING:
    from hf_lowbit.nn.linear import PackedLinear

CONSTANT_INPUT, CONSTANT_OUTPUT = "_constant_input", "_constant_output"  # after the name of a parameter
_LEAST_TOLERANCE = 1e-5  # relative: the same prompt in another batch differs by the order of summation


def constant_companions(module: PackedLinear, name: str) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Parameter name -> (shape, dtype) of what is stored for the constant token: float32 as int32 bit patterns."""
    if not module.layer_spec.constant_token:
        return {}
    return {
        f"{name}{CONSTANT_INPUT}": ((module.in_features,), torch.int32),
        f"{name}{CONSTANT_OUTPUT}": ((module.out_features,), torch.int32),
    }


def same_token(tokens: Tensor, constant: Tensor, dtype: torch.dtype) -> Tensor:
    """Which of ``[..., in]`` are the constant ``[in]``, as far as floats of a type can tell: bool ``[...]``."""
    tolerance = max(_LEAST_TOLERANCE, 4 * torch.finfo(dtype).eps)
    constant = constant.to(tokens.device, torch.float32)
    return (tokens.float() - constant).norm(dim=-1) <= tolerance * constant.norm()


def outputs_of_tokens(module: PackedLinear, x: Tensor) -> Tensor:
    """``[..., tokens, in]`` to ``[..., tokens, out]`` without the bias: the codes read all but token 0."""
    first = x[..., :1, :]
    if x.shape[-2] == 1:
        return _first_outputs(module, first)
    rest = module.unbiased(x[..., 1:, :])
    return torch.cat([_first_outputs(module, first).to(rest.dtype), rest], -2)


def _first_outputs(module: PackedLinear, first: Tensor) -> Tensor:
    constant, output = (tensor.view(torch.float32) for tensor in module.constant_token())
    if torch.is_grad_enabled() and first.requires_grad:  # a constant has no gradient
        return _in_full_precision(module, first)
    is_constant = same_token(first, constant, first.dtype).unsqueeze(-1)
    stored = output.to(first.dtype).expand(*first.shape[:-1], -1)
    if torch.compiler.is_compiling():
        return torch.where(is_constant, stored, _in_full_precision(module, first))
    if bool(is_constant.all()):
        return stored
    computed = _in_full_precision(module, first)
    return torch.where(is_constant, stored.to(computed.dtype), computed)


def _in_full_precision(module: PackedLinear, x: Tensor) -> Tensor:
    spec = module.layer_spec
    if spec.transform is None and spec.exact is None and not spec.low_rank:
        return packed_linear(x, module.packed(), None, module.backend)
    return F.linear(x, module.dequantized(dtype=x.dtype))
