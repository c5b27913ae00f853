"""``hf-lowbit push``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hf_lowbit.cli.app import command
from hf_lowbit.cli.console import facts, print_json, say, screen, work


@command("push")
def push_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder that quantize wrote.", show_default=False)],
    repo_id: Annotated[
        str, typer.Argument(metavar="REPO_ID", help="Repository on the Hub: me/model-w4.", show_default=False)
    ],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    token: Annotated[
        str | None, typer.Option(help="Access token; by default the one of hf auth login.", show_default=False)
    ] = None,
    message: Annotated[str | None, typer.Option(help="Message of the commit.", show_default=False)] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Upload a saved model, its report and its card to the Hub in one commit, after it was checked."""
    with work():
        from hf_lowbit import push_to_hub
        from hf_lowbit.cli.account import accounts
        from hf_lowbit.cli.run import load

        checked = accounts(folder)  # a damaged folder is refused before anything is created
        bits = {name or "model": account.report.bits_per_weight for name, account in checked.items()}
        model = load(folder, "loading")
        say(f"uploading {folder} to {repo_id}")
        commit = push_to_hub(
            model,
            repo_id,
            private=private or None,
            token=token,
            commit_message=message,
            tokenizer=_processing(folder, model),
        )
    if json_output:
        values = {
            "folder": str(folder),
            "repo_id": commit.repo_url.repo_id,
            "url": str(commit.repo_url),
            "commit": commit.oid,
        }
        print_json({**values, "bits_per_weight": bits})
        return
    screen().print(f"Uploaded {folder}", soft_wrap=True, markup=False)
    rows = [("repository", str(commit.repo_url)), ("commit", str(commit.oid))]
    facts([*rows, *((name, f"{value:.2f} bits per weight") for name, value in bits.items())])


def _processing(folder: Path, model: Any) -> Any:
    """Tokenizer or processor of the folder; a pipeline saves its own."""
    from torch import nn

    if not isinstance(model, nn.Module):
        return None
    from transformers import AutoProcessor, AutoTokenizer

    if (folder / "preprocessor_config.json").is_file() or (folder / "processor_config.json").is_file():
        return AutoProcessor.from_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder) if (folder / "tokenizer_config.json").is_file() else None
