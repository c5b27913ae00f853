"""Measured quality, in words: what evaluate and quickstart print, and what a report keeps."""

from __future__ import annotations

from typing import Any


def quality_rows(values: dict[str, Any]) -> list[tuple[str, str]]:
    """Label and value, with unit and interval, of every number of an evaluation."""
    rows = []
    if "perplexity" in values:
        rows.append(("perplexity", f"{values['perplexity']:.3f}{_interval(values, 'perplexity', '.3f')}"))
    if "reference_perplexity" in values:
        rows.append(("  of the reference", f"{values['reference_perplexity']:.3f}"))
    if "kl" in values:
        rows.append(("KL(reference || model)", f"{values['kl']:.4f} nats per token{_interval(values, 'kl', '.4f')}"))
    if "top1_agreement" in values:
        agreement = (
            f"{100 * values['top1_agreement']:.1f} % of next tokens{_interval(values, 'top1_agreement', '.1f', 100)}"
        )
        rows.append(("top-1 agreement", agreement))
    if "tokens" in values:
        rows.append(("measured on", _language_data(values)))
    if "wer" in values:
        rows.append(("word error rate", f"{100 * values['wer']:.1f} % of words{_interval(values, 'wer', '.1f', 100)}"))
        against = {"reference": "what the reference hears", "transcripts": "given transcripts"}[values["against"]]
        counted = (
            f"{values['words']} words in {values['utterances']} recording{'s' if values['utterances'] > 1 else ''}"
        )
        rows.append(("measured on", f"{counted}, against {against}"))
    return rows


def _language_data(values: dict[str, Any]) -> str:
    windows = f"{values['windows']} windows of {values['sequence_length']} tokens" if "windows" in values else ""
    data = values.get("data")
    return ", ".join(part for part in (f"{values['tokens']:,} predicted tokens", windows, data) if part)


def _interval(values: dict[str, Any], name: str, form: str, scale: float = 1.0) -> str:
    interval = values.get("intervals", {}).get(name)
    if interval is None:
        return ""
    low, high = (format(scale * bound, form) for bound in interval)
    return f"  (95 % interval {low} to {high})"
