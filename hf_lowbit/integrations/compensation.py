"""Compensation kept as an adapter: ``LowRankConfig(keep="adapter")`` through PEFT.

The low-rank part of the rounding error is a LoRA adapter named "lowbit" on the quantized model, and a standard PEFT
folder ``lowbit_adapter/`` beside the packed weights on disk. It belongs to the base: it stays active, and frozen, when
adapters of the user's own are added; ``model.disable_adapters()`` and ``model.delete_adapter("lowbit")`` switch it off.
"""

from __future__ import annotations

import logging
from importlib.util import find_spec

from torch import Tensor, nn

from hf_lowbit.config import LowbitConfig
from hf_lowbit.integrations.adapter_base import check_base
from hf_lowbit.integrations.adapter_files import FOLDER, find_adapter, read_adapter
from hf_lowbit.integrations.adapters import ADAPTER, inject, is_compensation, marked, rank_of
from hf_lowbit.nn import CorruptWeightError, PackedConv1d, PackedConv2d, PackedEmbedding, PackedModule
from hf_lowbit.plan import packed_modules
from hf_lowbit.state import QuantizationState

logger = logging.getLogger("hf_lowbit")


def keeps_adapter(config: LowbitConfig) -> bool:
    """True for configs whose compensation is an adapter."""
    return config.low_rank is not None and config.low_rank.keep == "adapter"


def attach_compensation(model: nn.Module, state: QuantizationState) -> None:
    """Attach the factors that quantization left in the state, so that the model computes with them.

    Raises:
        ValueError: the model is neither transformers' nor diffusers', so that nothing would save the adapter.
    """
    if not state.adapters:
        return
    if not hasattr(model, "save_pretrained"):
        raise ValueError(
            f'low_rank keep="adapter" is for transformers and diffusers models, and a {type(model).__name__} is '
            'neither: use keep="branch"'
        )
    modules = packed_modules(model)
    owners = {id(modules[name].weight): name for name in state.adapters}
    tensors: dict[str, Tensor] = {}
    targets: dict[str, int] = {}
    for name, module in modules.items():  # modules that share a packed weight share its repair
        owner = owners.get(id(getattr(module, "weight", None)))
        if owner is not None:
            a, b = state.adapters[owner]
            tensors.update({f"{name}.{key}": value.bfloat16() for key, value in _as_lora(module, a, b).items()})
            targets[name] = a.shape[0]
    from peft import LoraConfig

    rank = max(targets.values())  # alpha = r everywhere: PEFT multiplies B A by alpha / r
    config = LoraConfig(
        r=rank, lora_alpha=rank, target_modules=list(targets), inference_mode=True,
        rank_pattern=marked(list(targets), targets), alpha_pattern=marked(list(targets), targets),
    )  # fmt: skip
    inject(model, config, tensors)
    state.adapters = {}


def load_compensation(model: nn.Module, source: str | None) -> None:
    """Attach the adapter that was saved beside a packed checkpoint; where it cannot be had, warn.

    Args:
        model: reloaded, without adapters.
        source: folder or repository it was loaded from, or the folder of the client's cache with its weights.

    Raises:
        CorruptWeightError: the adapter cannot be read, or is not this model's.
    """
    installed = find_spec("peft") is not None
    folder = find_adapter(source) if installed else None
    if folder is None:
        place = source or "<folder or repository>"
        reason = (
            f"was not found beside its weights ({place})" if installed else 'needs PEFT (pip install "hf_lowbit[peft]")'
        )
        logger.warning(
            "this %s was quantized with a compensation adapter, which %s: it computes WITHOUT it, with a larger error. "
            "Attach it with "
            'peft.PeftModel.from_pretrained(model, %r, subfolder="%s", adapter_name="%s")',
            type(model).__name__,
            reason,
            place,
            FOLDER,
            ADAPTER,
        )
        return
    config, stored = read_adapter(folder)
    names = _names_in(model, stored)
    tensors = {
        f"{names[stem]}{separator}{rest}": tensor
        for key, tensor in stored.items()
        for stem, separator, rest in [key.partition(".lora_")]
        if stem in names
    }
    if not tensors:
        raise CorruptWeightError(
            f"the compensation adapter in {folder} is another model's: no module of it is in this one"
        )
    modules = packed_modules(model)
    check_base(folder, {stem: modules[name] for stem, name in names.items()})
    config.target_modules = sorted(names.values())
    if is_compensation(config):  # one that a user put there himself keeps its own scaling
        ranks = {name: rank_of(config, stem) for stem, name in names.items()}
        config.rank_pattern = marked(config.target_modules, ranks)
        config.alpha_pattern = marked(config.target_modules, ranks)
    config.inference_mode, config.base_model_name_or_path = True, None
    inject(model, config, tensors)


def _as_lora(module: PackedModule, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    """A ``[r, columns]`` and B ``[rows, r]`` of a module's matrix in the layout of its LoRA layer."""
    if isinstance(module, PackedEmbedding):  # rows are the inputs
        return {"lora_embedding_A": b.T.contiguous(), "lora_embedding_B": a.T.contiguous()}
    if isinstance(module, PackedConv1d | PackedConv2d):
        ones = [1] * len(module.kernel_size)
        return {"lora_A.weight": module.from_matrix("weight", a), "lora_B.weight": b.reshape(*b.shape, *ones)}
    return {"lora_A.weight": a, "lora_B.weight": b}


def _names_in(model: nn.Module, stored: dict[str, Tensor]) -> dict[str, str]:
    """Stored module name -> that in this model, which may lack the head of the saved one, or have another."""
    prefix = f"{getattr(model, 'base_model_prefix', '') or ''}."
    names = set(packed_modules(model))
    found = {}
    for stem in dict.fromkeys(key.partition(".lora_")[0] for key in stored):
        known = [name for name in (stem, stem.removeprefix(prefix), prefix + stem) if name in names]
        if known:
            found[stem] = known[0]
    return found
