"""What a fine-tuning run leaves: the adapter, a page about it, and its losses."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hf_lowbit.integrations.atomic import write_folder
from hf_lowbit.output import save_complete

RESULT_FILE = "lowbit_finetune.json"
_LIBRARIES = ("torch", "transformers", "peft")


def write_result(model: Any, output: Path, base: str, facts: dict[str, Any], fresh: bool) -> None:
    """Write the folder, in one step.

    Args:
        model: the trained PEFT model.
        base: where its packed weights were loaded from.
        facts: the JSON object, completed by versions.
        fresh: a new adapter, saved alone as PEFT does; else packed weights and trained compensation are saved.
    """
    facts["versions"] = {name: version(name) for name in _LIBRARIES}

    def write(folder: Path) -> None:
        page = folder / "README.md"
        if fresh:
            model.save_pretrained(folder)
            page.write_text(_adapter_page(facts), encoding="utf-8")
        else:
            save_complete(model.get_base_model(), folder, base)
            page.write_text(page.read_text(encoding="utf-8") + "\n" + _section(facts), encoding="utf-8")
        stored = {**facts, "model": _public(facts["model"])}
        (folder / RESULT_FILE).write_text(json.dumps(stored, indent=2) + "\n", encoding="utf-8")

    write_folder(output, write)


def _adapter_page(facts: dict[str, Any]) -> str:
    name = _public(facts["model"])
    header = f"---\nbase_model: {name}\nlibrary_name: peft\ntags:\n- hf_lowbit\n- lora\n---\n"
    code = (
        "```python\nimport hf_lowbit  # registers its formats\nfrom peft import PeftModel\n"
        f'from transformers import AutoModelForCausalLM\n\nmodel = AutoModelForCausalLM.from_pretrained("{name}")\n'
        'model = PeftModel.from_pretrained(model, "this-repository-or-folder")\n```\n'
    )
    what = f"# LoRA adapter for {name}\n\nTrained on the packed weights of that model."
    return f"{header}\n{what}\n\n{code}\n{_section(facts)}"


def _section(facts: dict[str, Any]) -> str:
    adapter, data, loss, settings = (facts[key] for key in ("adapter", "data", "held_out_loss", "settings"))
    rows = {
        "data": f"{data['description']}; {data['train']} samples, {data['held_out']} more held out",
        "adapter": f"rank {adapter['rank']}, alpha {adapter['alpha']:g}, {adapter['parameters']:,} parameters, "
        f"initialised with {adapter['initialisation']}",
        "held-out loss before": f"{loss['before']:.4f} nats per token",
        "held-out loss after": f"{loss['after']:.4f} nats per token",
        "learning rate, batch": f"{settings['learning_rate']:g}, {settings['batch_size'] * settings['accumulation']}",
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    return f"## Fine-tuning\n\n| | |\n|---|---|\n{table}\n\nLosses of all steps: `{RESULT_FILE}`.\n"


def _public(name: str) -> str:
    """A repository's id, or the last part of a folder's path."""
    return Path(name).resolve().name if Path(name).exists() else name
