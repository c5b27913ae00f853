"""What vLLM's compressed-tensors loader does not take, as far as its sources tell."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from hf_lowbit.export.scheme import Scheme
from hf_lowbit.nn import PackedEmbedding
from hf_lowbit.plan import packed_modules

# Layers that most of vLLM's models compute as one, so that they need one scheme.
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_ALWAYS = (4, 8)


def obstacles(model: nn.Module, schemes: dict[str, Scheme]) -> Iterator[str]:
    """Reasons why vLLM would refuse the exported folder, or needs a recent version."""
    for scheme in dict.fromkeys(schemes.values()):
        yield from _of_scheme(scheme)
    if any(isinstance(module, PackedEmbedding) for module in packed_modules(model).values()):
        yield "it reads embeddings in floating point only"
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for parent in dict.fromkeys(name.rpartition(".")[0] for name in schemes):
        for names in _FUSED:
            members = {f"{parent}.{name}" for name in names} & linear
            if len({schemes.get(member) for member in members}) > 1:
                yield f"it needs one format for {', '.join(names)}, which {parent} does not have"
                return  # one example is enough


def _of_scheme(scheme: Scheme) -> Iterator[str]:
    if scheme.quantized_input:
        if scheme.bits != 8 or scheme.group_size is not None or not scheme.symmetric:
            yield "with 8-bit inputs it takes symmetric 8-bit weights with one scale per row"
    elif scheme.bits not in _ALWAYS:
        if scheme.symmetric:
            yield f"weights of {scheme.bits} bits need a recent version; 4 and 8 bits do not"
        else:
            yield f"with zero points it takes weights of 4 or 8 bits, not of {scheme.bits}"
