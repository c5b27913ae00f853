"""What is compared: a name, and the config or the peer behind it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Variant:
    """One way to quantize.

    Attributes:
        name: in tables.
        method: of hf_lowbit, or "peer:NAME".
        fields: of the method's config, beside bits and group size; of a peer, arguments of its worker.
        by_default: whether it runs where no methods are named; not those that quantize inputs to 8 bits.
    """

    name: str
    method: str
    fields: dict[str, Any] = field(default_factory=dict)
    by_default: bool = True


BRANCH = {"rank": 16, "metric": "full", "factor_bits": 8}
VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("rtn", "rtn"),
        Variant("rtn-asym", "rtn", {"symmetric": False}),
        Variant("hqq", "hqq"),
        Variant("qlora", "qlora"),
        Variant("ir_qlora", "ir_qlora"),
        Variant("nupes", "nupes"),
        Variant("nupes-learned-50", "nupes", {"learn": True, "iterations": 50}),
        Variant("nupes-learned", "nupes", {"learn": True, "iterations": 200}),
        Variant("adaround-50", "adaround", {"iterations": 50}),
        Variant("adaround", "adaround", {"iterations": 200}),
        Variant("adaround-sym", "adaround", {"iterations": 200, "symmetric": True}, False),
        Variant("adaround-sym-50", "adaround", {"iterations": 50, "symmetric": True}, False),
        Variant("gptq-plain", "gptq", {"search_clip": False}),
        Variant("gptq-asym-plain", "gptq", {"symmetric": False, "search_clip": False}),
        Variant("gptq", "gptq"),
        Variant("gptq-asym", "gptq", {"symmetric": False}),
        Variant("gptq-asym-order", "gptq", {"symmetric": False, "act_order": True}),
        Variant("gptq-rotate", "gptq", {"rotate": True}),
        Variant("gptq-rotate-plain", "gptq", {"search_clip": False, "rotate": True}),
        Variant("gptq-tuned", "gptq", {"tuning": {"epochs": 4}}),
        Variant("quip", "quip", {"group_size": "tensor"}),
        Variant("spqr", "spqr", {"group_size": 16}),
        Variant("awq", "awq", {"symmetric": False}),
        Variant("rtn-a8", "rtn", {"activation_bits": 8}, False),
        Variant("rtn-a8-static", "rtn", {"activation_bits": 8, "activation_static": True}, False),
        Variant("smoothquant", "smoothquant", {}, False),
        Variant("smoothquant-static", "smoothquant", {"activation_static": True}, False),
        Variant(
            "smoothquant-static-but-down",
            "smoothquant",
            {"activation_static": True, "overrides": {"down_proj": {"activation_static": False}}},
            False,
        ),
        Variant("rtn-a4", "rtn", {"activation_bits": 4, "activation_group_size": 64}, False),
        Variant("smoothquant-a4", "smoothquant", {"activation_bits": 4, "activation_group_size": 64}, False),
        Variant("svdquant", "svdquant", {}, False),
        Variant("svdquant-once", "svdquant", {"iterations": 1}, False),
        Variant("svdquant-gptq", "svdquant", {"gptq": True}, False),
        Variant("svdquant-a16", "svdquant", {"activation_bits": None}, False),
        *(
            Variant(f"{method}-a{bits}-token", method, {"activation_bits": bits, **fields}, False)
            for bits in (4, 6)
            for method, fields in (
                ("rtn", {"symmetric": False}),
                ("smoothquant", {"symmetric": False}),
                ("omniquant", {}),
                ("qllm", {}),
                ("quarot", {}),
            )
        ),
        Variant("signround-50", "signround", {"iterations": 50}),
        Variant("signround", "signround", {"iterations": 200}),
        Variant("auto", "auto"),
        Variant("auto-tuned-4", "auto", {"tuning": {"epochs": 4}}),
        Variant("auto-int", "auto", {"formats": ["int"]}),
        *(
            Variant(f"auto-{budget}", "auto", {"bits_per_weight": budget}, budget == 3.25)
            for budget in (2.5, 3.25, 3.5)
        ),
        Variant("auto-3.63-untuned", "auto", {"bits_per_weight": 3.63, "tuning": None}, False),
        Variant("auto-branch-untuned", "auto", {"low_rank": BRANCH, "tuning": None}, False),
        Variant("auto-fast", "auto", {"effort": "fast"}, False),
        Variant("auto-12", "auto", {"iterations": 12}, False),
        Variant("auto-32", "auto", {"iterations": 32, "tuning": {"epochs": 2}}, False),
        Variant("auto-best", "auto", {"effort": "best"}),
        Variant("autoround", "peer:autoround", {"iterations": 200}),
        Variant("autoround-50", "peer:autoround", {"iterations": 50}),
        Variant("autoround-asym", "peer:autoround", {"iterations": 200, "symmetric": False}),
        Variant("gptqmodel", "peer:gptqmodel"),
    )
}
