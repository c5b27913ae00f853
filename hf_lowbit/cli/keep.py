"""Keeping measured numbers with the model they belong to."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def keep_evaluation(model: nn.Module, folder: Path, values: dict[str, Any]) -> None:
    """Write measured quality into the report of a saved model and, unless somebody else wrote it, its model card.

    Args:
        model: what the folder holds, loaded.
        folder: where it was saved. Each file is replaced in one step.
        values: numbers, with the "command" that measures them.

    Raises:
        FileNotFoundError: the folder has no report.
    """
    from hf_lowbit.integrations.card import CARD_FILE, is_ours, render_card
    from hf_lowbit.integrations.card_facts import gather_facts
    from hf_lowbit.reporting import REPORT_FILE, Report
    from hf_lowbit.state import state_of

    report, state = Report.load(folder), state_of(model)
    if report is None or state is None:
        raise FileNotFoundError(f"{folder} has no {REPORT_FILE} to keep the numbers in")
    report.evaluation = values
    state.report = report  # as it was saved: the model may have been cast since
    replace_file(folder / REPORT_FILE, report.to_json())
    card = folder / CARD_FILE
    if not card.is_file() or is_ours(card.read_text(encoding="utf-8", errors="replace")):
        replace_file(card, render_card(gather_facts(model, folder, location=None, download=False)))


def replace_file(path: Path, content: str) -> None:
    """Write a file so that at any moment it is the old one or the new one."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(content)
        os.chmod(name, path.stat().st_mode if path.exists() else 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
