"""Collecting what a card says of a model, from the model, its state and the cards it descends from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from torch import nn

from hf_lowbit.integrations.accounts import quantized_components, report
from hf_lowbit.integrations.card import CARD_FILE, CardFacts
from hf_lowbit.integrations.origin import hub_origin, name_or_path, read_beside
from hf_lowbit.integrations.usage import usage_of
from hf_lowbit.state import QuantizationState, state_of

ADAPTER_FOLDER = "lowbit_adapter"


def gather_facts(
    model: Any, folder: Path, *, location: str | None, download: bool, tags: tuple[str, ...] = ()
) -> CardFacts:
    """The facts of a quantized model or pipeline.

    Args:
        model: it.
        folder: where it was saved.
        location: the repository it goes to, or None.
        download: ask the Hub for the base model's card if it is not in the client's cache.
        tags: more tags.
    """
    parts = {"": model} if isinstance(model, nn.Module) else quantized_components(model)
    states = {name: state for name, part in parts.items() if (state := state_of(part)) is not None}
    reloaded = next((state.source for state in states.values() if state.source is not None), None)
    own = _metadata(name_or_path(model) if "" not in parts and reloaded else reloaded, download)
    base = _base_model(model, parts, states) or _repository(own.get("base_model"))
    return CardFacts(
        report=report(model),
        configs={name: state.config for name, state in states.items()},
        usage=usage_of(model),
        location=location,
        base_model=base,
        inherited={**_metadata(base, download), **own},
        adapter=ADAPTER_FOLDER if (folder / ADAPTER_FOLDER).is_dir() else None,
        tags=tags,
    )


def _base_model(model: Any, parts: dict[str, nn.Module], states: dict[str, QuantizationState]) -> str | None:
    """The repository of the float model: recorded at quantization, or what a model not reloaded since came from."""
    for name, state in states.items():
        provenance = state.config.provenance
        fresh = None if state.source is not None else name_or_path(parts[name]) or name_or_path(model)
        for source in (provenance.get("base_model"), provenance.get("source"), fresh):
            if found := _repository(source):
                return found
    return None


def _repository(source: Any) -> str | None:
    origin = hub_origin(source) if isinstance(source, str) else None
    return None if origin is None else origin.repo_id


def _metadata(source: str | None, download: bool) -> dict[str, Any]:
    """The YAML header of the card beside a model; empty if there is none that can be read."""
    text = read_beside(source, CARD_FILE, download=download)
    if text is None or not text.startswith("---"):
        return {}
    try:
        values: dict[str, Any] = ModelCard(text, ignore_metadata_errors=True).data.to_dict()
    except Exception:  # somebody else's YAML: whatever is wrong with it, a card is written without it
        return {}
    return values
