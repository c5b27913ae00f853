"""What is compared: names, methods and their configs' fields."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

REFERENCE = "float"
PEERS = ("torchao", "bitsandbytes")
SOME = 8  # windows of rows that are slow
W8A8 = {"bits": 8, "activation_bits": 8}
W4A8 = {"bits": 4, "activation_bits": 8}
W4A16 = {"bits": 4, "activation_bits": None}
ENDS = {"quantize_embeddings": True, "quantize_lm_head": True}
NO_CLIP = {"percentile": 100.0, "state_percentile": 100.0, "percentile_sigma": None}
FIRST_IN_8_BITS = {"overrides": {"layers.0": {"bits": 8, "group_size": None}}}  # which a search of blocks finds, too
ONE_CLUSTER = {"head_clusters": 1, "channel_clusters": 1}


@dataclass(frozen=True)
class Row:
    """One way to quantize.

    Attributes:
        name: of the row.
        method: "float", of hf_lowbit, or one of :data:`PEERS`.
        fields: of the method's config; of a peer what `mambas.peers` makes of it.
        timed: whether its speed is measured.
        slow: whether quality is measured on :data:`SOME` windows only.
        mixed: whether blocks are searched for whose values stay floats (``hf_lowbit.search_blocks``).
    """

    name: str
    method: str
    fields: dict[str, Any] = field(default_factory=dict)
    timed: bool = False
    slow: bool = False
    mixed: bool = False

    @property
    def is_peer(self) -> bool:
        """Whether another library quantizes."""
        return self.method in PEERS


def all_rows(generation: int) -> dict[str, Row]:
    """By name, for models of Mamba (1) or Mamba-2 (2); the float one first, which the others are held against."""
    rows = [Row(REFERENCE, "float", timed=True), Row("bfloat16", "float", {"dtype": "bfloat16"}, timed=True)]
    own = _quamba(generation), _quamba2(), _clusters() if generation == 2 else (), _peers(generation)
    return {row.name: row for row in (*rows, *_nearest(), *(row for part in own for row in part))}


def _nearest() -> Iterator[Row]:
    """The projections alone, rounded to nearest; and GPTQ."""
    yield Row("rtn-w8a8", "rtn", {**W8A8, "group_size": None}, timed=True)
    yield Row("rtn-w8a8-static", "rtn", {**W8A8, "group_size": "tensor", "activation_static": True})
    yield Row("rtn-w4a8", "rtn", {**W4A8, "group_size": 128})
    yield Row("rtn-w4a16", "rtn", {**W4A16, "group_size": 128}, timed=True)
    yield Row("gptq-w4a16", "gptq", {**W4A16, "group_size": 128, "search_clip": False})
    for size in (128, 64):
        groups = {**W4A16, "group_size": size}
        yield Row(f"signround-w4a16-{size}", "signround", {**groups, "iterations": 50})
        yield Row(f"auto-w4a16-{size}", "auto", groups)


def _quamba(generation: int) -> Iterator[Row]:
    """The recipe, and without its parts; on Mamba-2 it is known to fail."""
    asked = {"any_generation": True} if generation == 2 else {}
    yield Row("quamba-w8a8", "quamba", asked, timed=True)
    yield Row("quamba-naive", "quamba", {**asked, **NO_CLIP, "hadamard": False})
    yield Row("quamba-clip-only", "quamba", {**asked, "hadamard": False})
    yield Row("quamba-hadamard-only", "quamba", {**asked, **NO_CLIP})
    yield Row("quamba-99.95", "quamba", {**asked, "percentile": 99.95})  # the code's, where the paper has 99.999
    yield Row("quamba-state-99.999", "quamba", {**asked, "state_percentile": 99.999})
    yield Row("quamba-rotated", "quamba", {**asked, "rotate": True})
    if generation == 1:
        yield Row("quamba-state-channels", "quamba", {"state_scales": "channel"})


def _quamba2() -> Iterator[Row]:
    for name, bits in (("w8a8", W8A8), ("w4a8", W4A8), ("w4a16", W4A16)):
        yield Row(f"quamba2-{name}", "quamba2", bits, timed=True)
        yield Row(f"quamba2-{name}-ends", "quamba2", {**bits, **ENDS})
    yield Row("quamba2-w4ax", "quamba2", W4A8, mixed=True)
    for name, bits in (("w4a8", W4A8), ("w4a16", W4A16)):
        yield Row(f"quamba2-{name}-64", "quamba2", {**bits, "group_size": 64})
        yield Row(f"quamba2-{name}-first-8", "quamba2", {**bits, **FIRST_IN_8_BITS})
        yield Row(f"quamba2-{name}-64-first-8", "quamba2", {**bits, **FIRST_IN_8_BITS, "group_size": 64})
    yield Row("quamba2-w4a8-nearest", "quamba2", {**W4A8, "weights": "nearest"})
    yield Row("quamba2-w4a16-nearest", "quamba2", {**W4A16, "weights": "nearest"})
    yield Row("quamba2-w4a8-unrotated", "quamba2", {**W4A8, "rotate": False})


def _clusters() -> Iterator[Row]:
    """Where Quamba2's scales come from, of which only the scales differ."""
    for name, bits in (("w8a8", W8A8), ("w4a8", W4A8)):
        yield Row(f"quamba2-{name}-one-cluster", "quamba2", {**bits, **ONE_CLUSTER})
        yield Row(f"quamba2-{name}-no-groups", "quamba2", {**bits, "group_scales": False})
        yield Row(f"quamba2-{name}-neither", "quamba2", {**bits, **ONE_CLUSTER, "group_scales": False})
    yield Row("quamba2-w8a8-kmeans", "quamba2", {**W8A8, "clustering": "kmeans"})
    yield Row("quamba2-w8a8-mean", "quamba2", {**W8A8, "statistic": "mean_then_max"})


def _peers(generation: int) -> Iterator[Row]:
    """As they come and, of Mamba, without the projection that its mixer multiplies by itself (nor the tied head)."""
    yield Row("torchao-int8", "torchao", {"weights": "int8"}, timed=True)
    yield Row("torchao-int8-dynamic", "torchao", {"weights": "int8", "activations": "int8"})
    yield Row("torchao-int4", "torchao", {"weights": "int4"}, slow=True)
    yield Row("bitsandbytes-int8", "bitsandbytes", {"weights": "int8"}, timed=True)
    yield Row("bitsandbytes-nf4", "bitsandbytes", {"weights": "nf4"})
    if generation == 1:
        # torchao looks for names of weights, bitsandbytes for those of modules.
        fields = {"weights": "int8", "skip": ["dt_proj", "dt_proj.weight", "lm_head"]}
        yield Row("torchao-int8-dt-float", "torchao", fields, timed=True)
        yield Row("bitsandbytes-int8-dt-float", "bitsandbytes", fields, timed=True)
