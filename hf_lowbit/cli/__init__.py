"""The command line: ``hf-lowbit``, one module per command.

Importing this package loads neither torch nor transformers; commands import what they need when they run.
"""

from hf_lowbit.cli import (
    compare,
    dequantize,
    evaluate,
    export,
    finetune,
    inspection,
    methods,
    plot,
    push,
    quantize,
    quickstart,
    search,
)
from hf_lowbit.cli.app import app

__all__ = [
    "app",
    "compare",
    "dequantize",
    "evaluate",
    "export",
    "finetune",
    "inspection",
    "main",
    "methods",
    "plot",
    "push",
    "quantize",
    "quickstart",
    "search",
]

# In help texts, the order in which a newcomer meets them.
_ORDER = (
    "quickstart",
    "methods",
    "quantize",
    "search",
    "inspect",
    "evaluate",
    "compare",
    "plot",
    "finetune",
    "dequantize",
    "export",
    "push",
)
app.registered_commands.sort(key=lambda registered: _ORDER.index(registered.name or ""))


def main() -> None:
    """The console script ``hf-lowbit``."""
    app()
