"""``hf-lowbit search --blocks``: which blocks are worth better fields, and what was found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from hf_lowbit.cli.console import facts, print_json, screen

if TYPE_CHECKING:
    from hf_lowbit.config import LowbitConfig
    from hf_lowbit.search import BlockChoice


def search_blocks_to(
    model: str, config: LowbitConfig, data: str, count: str, better: list[str], output: Path
) -> BlockChoice:
    """Search the blocks of a model, and write the config.

    Args:
        count: of blocks; "quarter" of them.
        better: ``field=value`` texts; empty: inputs in full precision.

    Raises:
        RequestError: another count, full precision where no inputs are quantized, or a model without logits.
        ConfigError: a model, a count or fields that cannot be.
    """
    from torch import nn

    from hf_lowbit.calibration.divergence import SensitivityError
    from hf_lowbit.cli.errors import RequestError
    from hf_lowbit.cli.run import load
    from hf_lowbit.cli.settings import assign, parse_group
    from hf_lowbit.search import search_blocks

    if count != "quarter" and not count.isdecimal():
        raise RequestError(f"--blocks takes a number of blocks, or quarter, not {count!r}")
    if not better and config.activation_bits is None and config.activation_format is None:
        raise RequestError(
            "--blocks gives blocks inputs in full precision, and this config quantizes none: --set activation_bits=8, "
            "or say what they get, as --better bits=8"
        )
    fields: dict[str, Any] = {}
    for assignment in better or ["activation_bits=none"]:
        assign(fields, assignment)
    if "group_size" in fields:
        fields["group_size"] = parse_group(fields["group_size"])
    loaded = load(model, "loading")
    assert isinstance(loaded, nn.Module)
    try:
        found = search_blocks(loaded, config, data, None if count == "quarter" else int(count), fields)
    except SensitivityError as error:
        raise RequestError(str(error)) from None
    output.write_text(json.dumps(found.config.to_dict(), indent=2) + "\n", encoding="utf-8")
    return found


def show_blocks(
    found: BlockChoice, model: str, data: str, better: list[str], output: Path, seconds: float, json_output: bool
) -> None:
    """What was found, and what comes next."""
    if json_output:
        values = {"blocks": list(found.blocks), "losses": found.losses, "least": found.least}
        given = {"model": model, "output": str(output), "command_seconds": seconds}
        print_json({**values, "config": found.config.to_dict(), **given})
        return
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    gets = ", ".join(better) or "full precision"
    for column in ("block", "KL if it alone is as the config says", "gets"):
        table.add_column(column, justify="right" if column.startswith("KL") else "left")
    for name, loss in found.losses.items():
        table.add_row(escape(name), f"{loss:.3g}", escape(gets) if name in found.blocks else "")
    screen().print(table)
    facts([("blocks", f"{len(found.blocks)} of {len(found.losses)}"), ("KL if none is", f"{found.least:.3g}")])
    screen().print(
        f"Written to {output} in {seconds:.1f} s; next: hf-lowbit quantize {model} --config {output} --data {data} "
        "--output DIR",
        soft_wrap=True,
        markup=False,
    )
