"""Layers that decide what a picture shows, and layers that decide how well it is drawn (MixDQ, arXiv 2405.17873)."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from hf_lowbit.plan.patterns import first_match

CONTENT, QUALITY = "content", "quality"
_COMPONENTS = frozenset(("ff", "ff_context", "attn2"))  # diffusers' names of feed-forward nets and cross-attention
_JOINT = "add_k_proj"  # keys of the text in an attention over text and picture (SD3, Flux)


def group_layers(
    names: Collection[str], text_layers: Collection[str], patterns: Sequence[str] | None = None
) -> dict[str, str]:
    """Layer -> :data:`CONTENT` or :data:`QUALITY`, in the order of the names.

    Content is what feed-forward nets and attention over the text compute; quality is everything else: convolutions,
    self-attention, projections, embeddings of time.

    Args:
        text_layers: layers that read the text (:func:`hf_lowbit.calibration.first_token.find_text_layers`): whatever
            lies beside them is cross-attention, under any name.
        patterns: names or regular expressions of the content layers, instead of these rules.
    """
    beside = {name.rpartition(".")[0] for name in text_layers}
    beside |= {name.rpartition(".")[0] for name in names if name.rpartition(".")[2] == _JOINT}
    beside.discard("")  # the model itself projects the text

    def is_content(name: str) -> bool:
        if patterns is not None:
            return first_match(patterns, name) is not None
        return not _COMPONENTS.isdisjoint(name.split(".")) or any(name.startswith(f"{owner}.") for owner in beside)

    return {name: CONTENT if is_content(name) else QUALITY for name in names}
