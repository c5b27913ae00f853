"""Running the engine for a command."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_lowbit.cli.progress import progress

if TYPE_CHECKING:
    from hf_lowbit.config import LowbitConfig


def quantize_to(
    model: str,
    config: LowbitConfig,
    output: Path,
    data: str | None = None,
    components: list[str] | None = None,
    restart: bool = False,
    others: dict[str, Any] | None = None,
) -> bool:
    """Quantize a folder or repository into ``output``.

    Args:
        others: of quantize(): the device, prompts, steps and other arguments of a pipeline that draws its data.

    Returns:
        True if ``output`` already held this result, which was kept.

    Raises:
        FileExistsError: it holds something else.
    """
    from hf_lowbit import quantize

    before = _report_files(output)
    _quiet_pipeline(model)
    try:
        with progress("quantizing"):
            quantize(
                model, config, data=data, output=output, resume=not restart, components=components, **(others or {})
            )
    except FileExistsError as error:
        raise FileExistsError(str(error).replace("pass resume=False", "add --restart")) from None
    return bool(before) and before == _report_files(output)


def load(model: str | Path, description: str) -> Any:
    """Load a model or pipeline, quantized or not."""
    from hf_lowbit.integrations.loading import load_quantized

    _quiet_pipeline(model)
    with progress(description):
        return load_quantized(model)


def _quiet_pipeline(model: str | Path) -> None:
    """No bars of diffusers in a log file: it does not look whether somebody watches."""
    if (Path(model) / "model_index.json").is_file() and not sys.stderr.isatty():
        from diffusers.utils import logging

        logging.disable_progress_bar()


def _report_files(folder: Path) -> dict[str, os.stat_result]:
    from hf_lowbit.reporting import REPORT_FILE

    return {str(path): path.stat() for path in (*folder.glob(REPORT_FILE), *folder.glob(f"*/{REPORT_FILE}"))}
