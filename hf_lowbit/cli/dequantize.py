"""``hf-lowbit dequantize``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hf_lowbit.cli.app import command
from hf_lowbit.cli.console import print_json, screen, size, work


@command("dequantize")
def dequantize_command(
    folder: Annotated[
        str, typer.Argument(metavar="DIR", help="Folder or repository of a quantized model.", show_default=False)
    ],
    output: Annotated[Path, typer.Option(help="Folder for the float model: new or empty.", show_default=False)],
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Save a quantized model as an ordinary float model that needs no hf_lowbit to load."""
    with work():
        from hf_lowbit.cli.sources import check_model, check_new_folder

        check_model(folder)
        check_new_folder(output)
        _dequantize(folder, output)
    written = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    if json_output:
        print_json({"model": folder, "output": str(output), "bytes": written})
    else:
        screen().print(f"Wrote the float model of {folder} to {output}: {size(written)}", soft_wrap=True, markup=False)


def _dequantize(folder: str, output: Path) -> None:
    from torch import nn

    from hf_lowbit.cli.run import load
    from hf_lowbit.config import ConfigError
    from hf_lowbit.integrations.atomic import write_folder
    from hf_lowbit.output import save_complete
    from hf_lowbit.quantization import dequantize
    from hf_lowbit.state import state_of

    model = load(folder, "loading")
    parts = [model] if isinstance(model, nn.Module) else list(model.components.values())
    quantized = [part for part in parts if state_of(part) is not None]
    if not quantized:
        raise ConfigError(f"{folder} holds a model that is not quantized by hf_lowbit")
    for part in quantized:
        dequantize(part)
    write_folder(output, lambda staged: save_complete(model, staged, folder))
