"""PEFT's LoRA layers on packed modules.

The adapter computes on top of the packed module's output, as on any layer. PEFT's own code reads or changes the float
weight in three places only: when a layer is made, in DoRA's norm, and on merging. For these a float stand-in takes the
packed module's place, so that the arithmetic stays PEFT's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from hf_lowbit.integrations.adapters import ADAPTER, is_compensation
from hf_lowbit.integrations.compat import peft as compat
from hf_lowbit.integrations.peft_dora import (
    PackedDoraConv1d,
    PackedDoraConv2d,
    PackedDoraEmbedding,
    PackedDoraLinear,
)
from hf_lowbit.integrations.peft_merge import packed_tensors, requantize, restore
from hf_lowbit.nn import PackedConv1d, PackedConv2d, PackedEmbedding, PackedLinear, PackedModule

_INITIALISATIONS = (True, False, "gaussian")
_VARIANTS = ((), ("use_dora",), ("alora_invocation_tokens",))  # those that leave the base weight alone
# What model code reads of a layer beside its weight (Whisper its convolutions' stride); PEFT's layers do not have them.
_CONV_GEOMETRY = "in_channels out_channels kernel_size stride padding padding_mode dilation groups"
_GEOMETRY = frozenset((*_CONV_GEOMETRY.split(), "num_embeddings", "embedding_dim", "padding_idx"))


class _OnPacked:
    """What a LoRA layer does differently when its base layer is packed. Mixed in before PEFT's class."""

    needs_float_base = False  # to make an adapter even without DoRA
    dora_variant: type
    base_layer: nn.Module
    merged_adapters: list[str]
    r: dict[str, int]
    _originals: dict[str, Tensor] | None = None

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: Any, **kwargs: Any) -> None:
        """Add an adapter, in float32. Raises ValueError for initialisations that rewrite the float weight."""
        _check_initialisation(config)
        if config.use_dora or self.needs_float_base:
            with self._float_base():
                super().update_layer(adapter_name, r, lora_alpha, config=config, **kwargs)  # type: ignore[misc]
        else:
            super().update_layer(adapter_name, r, lora_alpha, config=config, **kwargs)  # type: ignore[misc]
        if adapter_name != ADAPTER and ADAPTER in self.r and is_compensation(config):  # the same, or trained from it
            compat.set_active_adapters(self, [name for name in compat.active_adapters(self) if name != ADAPTER])
            self.delete_adapter(ADAPTER)
        elif adapter_name != ADAPTER:
            self._freeze_compensation()

    @property
    def lora_variants(self) -> dict[tuple[str, ...], type | None]:
        """PEFT's variants that leave the base weight alone."""
        supported = super().lora_variants  # type: ignore[misc]
        variants = {key: variant for key, variant in supported.items() if key in _VARIANTS}
        return {**variants, ("use_dora",): self.dora_variant}

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Choose the active adapters; the compensation stays active beside them, and is not trained with them."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        if ADAPTER in self.r:
            names = [*(name for name in names if name != ADAPTER), ADAPTER]
        super().set_adapter(names, inference_mode)  # type: ignore[misc]
        if names != [ADAPTER]:
            self._freeze_compensation()

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters into the weight and quantize it again, with the recipe the layer was quantized with."""
        packed = self.base_layer
        if not isinstance(packed, PackedModule):  # dequantized since, or a stand-in
            super().merge(safe_merge, adapter_names)  # type: ignore[misc]
            return
        names = compat.check_adapters_to_merge(cast(Any, self), adapter_names)
        if not names:
            return
        merged_before, current = self.merged_adapters, packed_tensors(packed)
        originals = self._originals or current
        try:  # from the unmerged weight, so that the rounding of an earlier merge is not merged too
            restore(packed, originals)
            self.merged_adapters = []
            with self._float_base() as float_base:
                super().merge(safe_merge, [*merged_before, *names])  # type: ignore[misc]
            requantize(packed, float_base.weight.detach())
        except BaseException:
            restore(packed, current)
            self.merged_adapters = merged_before
            raise
        self._originals = originals

    def unmerge(self) -> None:
        """Put the packed tensors from before :meth:`merge` back, exactly."""
        if not isinstance(self.base_layer, PackedModule) or self._originals is None:
            super().unmerge()  # type: ignore[misc]
            return
        restore(self.base_layer, self._originals)
        self._originals, self.merged_adapters = None, []

    @contextmanager
    def _float_base(self) -> Iterator[Any]:
        packed = self.base_layer
        assert isinstance(packed, PackedModule)
        self.base_layer = packed.to_float(torch.float32)
        try:
            yield self.base_layer
        finally:
            self.base_layer = packed

    def __getattr__(self, name: str) -> Any:
        if name in _GEOMETRY:
            return getattr(self.base_layer, name)
        return super().__getattr__(name)  # type: ignore[misc]

    def _freeze_compensation(self) -> None:
        for name, parameter in self.named_parameters():
            if "lora_" in name and ADAPTER in name.split("."):
                parameter.requires_grad_(False)


class PackedLoraLinear(_OnPacked, compat.Linear):
    """LoRA on PackedLinear and PackedConv1D."""

    dora_variant = PackedDoraLinear


class PackedLoraEmbedding(_OnPacked, compat.Embedding):
    """LoRA on PackedEmbedding."""

    dora_variant = PackedDoraEmbedding


class _OnPackedConv(_OnPacked):
    needs_float_base = True  # PEFT makes the adapter with the base layer's own class

    @property
    def _kernel_dim(self) -> int:
        return len(self.base_layer.kernel_size) + 2  # type: ignore[arg-type]

    @_kernel_dim.setter
    def _kernel_dim(self, value: int) -> None:
        """PEFT sets it from the weight's dimensions, which packed are two."""


class PackedLoraConv1d(_OnPackedConv, compat.Conv1d):
    """LoRA on PackedConv1d."""

    dora_variant = PackedDoraConv1d


class PackedLoraConv2d(_OnPackedConv, compat.Conv2d):
    """LoRA on PackedConv2d."""

    dora_variant = PackedDoraConv2d


LORA_LAYERS: dict[type[PackedModule], type] = {
    PackedLinear: PackedLoraLinear,  # and PackedConv1D
    PackedEmbedding: PackedLoraEmbedding,
    PackedConv1d: PackedLoraConv1d,
    PackedConv2d: PackedLoraConv2d,
}


def _check_initialisation(config: Any) -> None:
    value = config.init_lora_weights
    if value in _INITIALISATIONS or (value == "eva" and config.inference_mode):  # a trained one is plain LoRA
        return
    raise ValueError(
        f"init_lora_weights={value!r} works on the float weights of the base layer, which hf_lowbit has packed. Use "
        "True, False or 'gaussian'; to repair what rounding lost, quantize with low_rank=LowRankConfig(rank)"
    )
