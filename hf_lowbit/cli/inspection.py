"""``hf-lowbit inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hf_lowbit.cli.app import command
from hf_lowbit.cli.console import print_json, screen, work


@command("inspect")
def inspect_command(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder of a saved model or pipeline.", show_default=False)
    ],
    layers: Annotated[bool, typer.Option("--layers", help="Show every layer.")] = False,
    json_output: Annotated[
        bool, typer.Option("--json", help="Print one JSON object; it always has every layer.")
    ] = False,
) -> None:
    """Say what a saved model stores, and check its files against its report. The model is not loaded."""
    with work() as warnings:
        from hf_lowbit.cli.account import accounts

        result = accounts(folder)
    from hf_lowbit.cli.view import account_json, show_account

    if json_output:
        print_json(account_json(folder, result))
        return
    screen().print(str(folder), soft_wrap=True, markup=False)
    show_account(result, warnings, layers)
