"""The model card: a template filled from the report, with the metadata that the Hub reads."""

from __future__ import annotations

import hashlib
import importlib.resources
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from string import Template
from typing import Any

from huggingface_hub import ModelCardData

from hf_lowbit.config import LowbitConfig
from hf_lowbit.integrations import card_tables
from hf_lowbit.integrations.usage import Usage
from hf_lowbit.method import methods
from hf_lowbit.reporting import Report

CARD_FILE = "README.md"
TEMPLATE_FILE = "template.md"
UNKNOWN_LOCATION = "this-repository-or-folder"
_MARKER = re.compile(r"\n<!-- written by hf_lowbit, ([0-9a-f]{64}); an edited card is kept -->\n*\Z")
_INHERITED = ("license", "license_name", "license_link", "pipeline_tag")


@dataclass(frozen=True)
class CardFacts:
    """All that a card says.

    Attributes:
        report: of the model, or of all quantized components of a pipeline.
        configs: component -> its config; the key is "" for a single model.
        usage: how it is loaded.
        location: repository id, or None while it is not known.
        base_model: repository id of the float model, or None.
        inherited: metadata of the base model's card, of which license and task are taken over.
        adapter: folder of an adapter beside the weights, or None.
        tags: more tags.
    """

    report: Report
    configs: dict[str, LowbitConfig]
    usage: Usage
    location: str | None = None
    base_model: str | None = None
    inherited: dict[str, Any] = field(default_factory=dict)
    adapter: str | None = None
    tags: tuple[str, ...] = ()


def render_card(facts: CardFacts) -> str:
    """The card as Markdown with a YAML header; its last line marks it as ours."""
    report = facts.report
    before = report.original_bits
    body = Template(_template()).substitute(
        title=_title(facts),
        what=_what(facts),
        layer_count=len(report.layers),
        bits_before="not known" if before is None else before,
        bits_after=f"{report.bits_per_weight:.3f}",
        bytes_before="not known" if before is None else f"{report.elements * before // 8:,}",
        bytes_after=f"{report.packed_bytes:,}",
        bytes_other=f"{report.other_bytes:,}",
        formats=card_tables.formats(report.layers),
        skipped=card_tables.skipped(report.skipped),
        code=facts.usage.code(facts.location or UNKNOWN_LOCATION, facts.adapter),
        evaluation=card_tables.evaluation(report.evaluation),
        method=_method(facts),
        configuration=_configuration(facts),
        versions=_versions(facts),
        limits=_limits(report),
    )
    return mark(f"---\n{_metadata(facts).to_yaml()}\n---\n\n{body}")


def mark(text: str) -> str:
    """The text with a last line by which :func:`is_ours` knows that nobody edited it."""
    text = text.rstrip("\n") + "\n"
    return f"{text}\n<!-- written by hf_lowbit, {_digest(text)}; an edited card is kept -->\n"


def is_ours(text: str) -> bool:
    """True for a card that :func:`render_card` wrote and nobody changed since: it may be replaced."""
    text = text.replace("\r\n", "\n")
    found = _MARKER.search(text)
    return found is not None and found[1] == _digest(text[: found.start()])


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _template() -> str:
    """The template: in the installed package, or in the source tree of a checkout that is not installed."""
    try:
        return importlib.resources.files("hf_lowbit.model_cards").joinpath(TEMPLATE_FILE).read_text(encoding="utf-8")
    except (ModuleNotFoundError, FileNotFoundError):
        checkout = Path(__file__).resolve().parents[2] / "model_cards"
        return (checkout / TEMPLATE_FILE).read_text(encoding="utf-8")


def _metadata(facts: CardFacts) -> ModelCardData:
    layers = facts.report.layers
    tags = [
        "hf_lowbit",
        *facts.report.method.split(" + "),
        *(f"{bits}-bit" for bits in sorted({layer.bits for layer in layers})),
        *sorted({layer.format for layer in layers}),
        *facts.tags,
    ]
    values: dict[str, Any] = {"library_name": facts.usage.library, "tags": list(dict.fromkeys(tags))}
    if facts.usage.task is not None:
        values["pipeline_tag"] = facts.usage.task
    if facts.base_model is not None:
        values |= {"base_model": facts.base_model, "base_model_relation": "quantized"}
    values |= {key: facts.inherited[key] for key in _INHERITED if facts.inherited.get(key)}
    return ModelCardData(**values)


def _title(facts: CardFacts) -> str:
    if facts.location is not None:
        return facts.location.rpartition("/")[2]
    name = "This model" if facts.base_model is None else facts.base_model.rpartition("/")[2]
    return f"{name}, quantized with {facts.report.method}"


def _what(facts: CardFacts) -> str:
    base = facts.base_model
    source = "a model" if base is None else f"[{base}](https://huggingface.co/{base})"
    kinds = sorted({f"{layer.format} {layer.bits} bits" for layer in facts.report.layers})
    parts = [name for name in facts.configs if name]
    where = f" in {_join(f'`{name}`' for name in parts)}" if parts else ""
    text = (
        f"This is {source} with {len(facts.report.layers)} weight parameters{where} packed by hf_lowbit "
        f"to {_join(kinds)}, at {facts.report.bits_per_weight:.3f} bits per weight."
    )
    if facts.adapter is not None:
        text += f" An adapter stands beside it in `{facts.adapter}/`."
    return text


def _method(facts: CardFacts) -> str:
    lines = []
    for name in facts.report.method.split(" + "):
        method = methods().get(name)
        lines.append(f"- Method `{name}`" if method is None else f"- Method `{name}`: {method.summary}")
        if method is not None:
            lines.append(f"- Paper: {method.paper}")
    if facts.report.seconds is not None:
        lines.append(f"- Time to quantize: {facts.report.seconds:.1f} s")
    if facts.report.peak_memory_bytes is not None:
        lines.append(f"- Peak memory of the process by then: {facts.report.peak_memory_bytes:,} bytes")
    lines += [f"- Note: {card_tables.without_paths(warning)}" for warning in facts.report.warnings]
    return "\n".join(lines)


def _configuration(facts: CardFacts) -> str:
    values = [f"{f'# {name}' + chr(10) if name else ''}{config!r}" for name, config in facts.configs.items()]
    return "```python\n" + card_tables.without_paths("\n".join(values)) + "\n```"


def _versions(facts: CardFacts) -> str:
    found: dict[str, set[str]] = {}
    for config in facts.configs.values():
        for library, version in config.provenance.get("versions", {}).items():
            found.setdefault(library, set()).add(str(version))
    listed = _join(f"{library} {'/'.join(sorted(versions))}" for library, versions in found.items())
    return f"Versions: {listed or 'not recorded'}."


def _limits(report: Report) -> str:
    ways: dict[str, int] = {}
    for layer in report.layers:
        ways[layer.arithmetic] = ways.get(layer.arithmetic, 0) + 1
    arithmetic = _join(f"{way} ({count} parameters)" for way, count in ways.items())
    lines = [
        f"- Products are computed with these weights: {arithmetic}, backend {report.backend}. Speed was not measured.",
        "- What limits the float model limits this one, and its licence applies.",
    ]
    if not report.evaluation:
        lines.insert(0, "- The quality of the output was not measured: evaluate it on your own data before use.")
    if any(layer.error is None and layer.tied_to is None for layer in report.layers):
        lines.append("- The rounding errors of some parameters are not known: the report of quantization was lost.")
    return "\n".join(lines)


def _join(parts: Iterable[str]) -> str:
    return ", ".join(parts)
