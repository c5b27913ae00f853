"""``hf-lowbit dequantize``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hf_lowbit.cli.app import command
from hf_lowbit.cli.console import print_json, screen, size, work


@command("dequantize")
def dequantize_command(
    folder: Annotated[
        str, typer.Argument(metavar="DIR", help="Folder or repository of a quantized model.", show_default=False)
    ],
    output: Annotated[Path, typer.Option(help="Folder for the float model: new or empty.", show_default=False)],
    adapter: Annotated[
        str | None,
        typer.Option(
            metavar="DIR", help="Folder or repository of a PEFT adapter to merge into the weights.", show_default=False
        ),
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Save a quantized model as an ordinary float model that needs no hf_lowbit to load."""
    with work():
        from hf_lowbit.cli.sources import check_model, check_new_folder

        check_model(folder)
        check_new_folder(output)
        if adapter is not None:
            check_model(adapter)
        _dequantize(folder, output, adapter)
    written = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    if json_output:
        print_json({"model": folder, "adapter": adapter, "output": str(output), "bytes": written})
    else:
        screen().print(f"Wrote the float model of {folder} to {output}: {size(written)}", soft_wrap=True, markup=False)


def _dequantize(folder: str, output: Path, adapter: str | None) -> None:
    from torch import nn

    from hf_lowbit.cli.run import load
    from hf_lowbit.config import ConfigError
    from hf_lowbit.integrations.atomic import write_folder
    from hf_lowbit.integrations.compat.adapters import set_adapters_loaded
    from hf_lowbit.output import save_complete
    from hf_lowbit.quantization import dequantize
    from hf_lowbit.state import state_of

    model = load(folder, "loading")
    parts = [model] if isinstance(model, nn.Module) else list(model.components.values())
    quantized = [part for part in parts if state_of(part) is not None]
    if not quantized:
        raise ConfigError(f"{folder} holds a model that is not quantized by hf_lowbit")
    merging = None if adapter is None else _with_adapter(model, adapter)
    for part in quantized:
        dequantize(part)
    if merging is not None:
        model = merging.merge_and_unload(safe_merge=True)
        set_adapters_loaded(model, False)  # a compensation had told the library so, and is folded in
    write_folder(output, lambda staged: save_complete(model, staged, folder))


def _with_adapter(model: Any, adapter: str) -> Any:
    from torch import nn

    from hf_lowbit.cli.errors import RequestError

    if not isinstance(model, nn.Module):
        raise RequestError("--adapter is for single models, and this is a pipeline: load its LoRA with diffusers")
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(model, adapter)
    except ValueError as error:  # no adapter there, or one for other layers
        raise RequestError(str(error)) from None
