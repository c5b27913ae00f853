"""Packed mixture-of-experts weights: gated experts fused into three-dimensional parameters."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_lowbit.nn.base import PackedModule
from hf_lowbit.nn.spec import LayerSpec


class PackedExperts(PackedModule):
    """Experts whose ``gate_up_proj`` is ``[experts, 2 * intermediate, hidden]`` and ``down_proj`` ``[experts, hidden,
    intermediate]``, with the gate above the up projection, no bias and no transposition (Mixtral, Qwen-MoE and kin).

    Every companion keeps the experts first and the rows second, so that transformers can merge per-expert tensors
    into the fused ones when it loads and split them again when it saves.
    """

    kind = "experts"
    packed_parameters = ("gate_up_proj", "down_proj")

    def __init__(
        self, gate_up_proj: nn.Parameter, down_proj: nn.Parameter, act_fn: Callable[[Tensor], Tensor], spec: LayerSpec
    ) -> None:
        super().__init__()
        self.num_experts, self.hidden_dim, self.intermediate_dim = down_proj.shape
        self.act_fn, self.layer_spec = act_fn, spec
        self.gate_up_proj, self.down_proj = gate_up_proj, down_proj

    @classmethod
    def from_float(cls, module: nn.Module, spec: LayerSpec) -> PackedExperts:
        """From a transformers experts module that passes :func:`unsupported_experts`."""
        if reason := unsupported_experts(module):
            raise TypeError(reason)
        packed = cls(module.gate_up_proj, module.down_proj, module.act_fn, spec)  # type: ignore[arg-type]
        object.__setattr__(packed, "_float_module_class", type(module))
        object.__setattr__(packed, "_config", getattr(module, "config", None))
        return packed

    def to_float(self, dtype: torch.dtype) -> nn.Module:
        """The original experts class with dequantized weights."""
        with torch.device("meta"):
            module: nn.Module = self._float_module_class(self._config)  # type: ignore[operator]
        for name in self.packed_parameters:
            setattr(module, name, nn.Parameter(self.dequantized(name, dtype)))
        return module

    def matrix_shape(self, name: str) -> tuple[tuple[int, ...], int]:
        """((experts, rows), columns)."""
        if name == "gate_up_proj":
            return (self.num_experts, 2 * self.intermediate_dim), self.hidden_dim
        return (self.num_experts, self.hidden_dim), self.intermediate_dim

    def branches(self, name: str) -> int:
        """Gate and up have a low-rank branch each, so that saving can split them."""
        return 2 if name == "gate_up_proj" else 1

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Tokens ``[n, hidden]`` through the experts ``top_k_index`` ``[n, k]``, weighted by ``top_k_weights``."""
        result = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            if expert >= self.num_experts:  # transformers' mark for a token that belongs to another device
                continue
            token, position = torch.where(top_k_index == expert)
            gate, up = self._project("gate_up_proj", expert, hidden_states[token]).chunk(2, -1)
            output = self._project("down_proj", expert, self.act_fn(gate) * up)
            result.index_add_(0, token, (output * top_k_weights[token, position, None]).to(result.dtype))
        return result

    def _project(self, name: str, expert: int, x: Tensor) -> Tensor:
        y = self.multiply(x, self.packed(name)[expert], name, expert)
        factors = self.low_rank_factors(name, x.dtype, expert)
        if factors is None:
            return y
        a, b = factors
        blocks = zip(b.chunk(self.branches(name), 0), a.chunk(self.branches(name), 0), strict=True)
        return y + torch.cat([F.linear(F.linear(x, a_block), b_block) for b_block, a_block in blocks], -1)


def unsupported_experts(module: nn.Module) -> str | None:
    """Why an experts module cannot be packed, or None if it can."""
    reasons = {"is_transposed": False, "has_bias": False, "has_gate": True, "is_concatenated": True}
    for attribute, expected in reasons.items():
        if getattr(module, attribute, expected) != expected:
            return f"experts with {attribute}={not expected} are not supported"
    if not isinstance(getattr(module, "gate_up_proj", None), nn.Parameter) or not hasattr(module, "act_fn"):
        return "experts without a fused gate_up_proj and act_fn are not supported"
    gate = getattr(type(module), "_apply_gate", None)
    if gate is not None and gate.__name__ != "_default_apply_gate":
        return "experts with their own gating function are not supported"
    return None
