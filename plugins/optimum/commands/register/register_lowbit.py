"""``optimum-cli lowbit ...``: an alias that hands its arguments to ``hf-lowbit``.

optimum imports this file at every start of its command line, so that it imports neither torch nor hf_lowbit.
"""

from __future__ import annotations

import sys
from argparse import REMAINDER, ArgumentParser

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

_COMMANDS = {
    "quickstart": "See it work on a small model.",
    "methods": "List the installed methods, or the fields of one.",
    "quantize": "Quantize a model while it loads, and save it.",
    "inspect": "Say what a saved model stores.",
    "evaluate": "Measure the quality of a model.",
    "dequantize": "Save a quantized model as a float model.",
    "push": "Upload a saved model to the Hub.",
}


class ForwardedCommand(BaseOptimumCLICommand):
    """One command of hf-lowbit: everything after its name goes there unread, ``--help`` included."""

    COMMAND = CommandInfo(name="quantize", help=_COMMANDS["quantize"])

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Leave all arguments alone, by a prefix that no argument begins with."""
        parser.prefix_chars = "\0"
        for action in list(parser._actions):  # -h and --help, which argparse would answer itself
            parser._remove_action(action)
        parser._option_string_actions.clear()
        parser.add_argument("arguments", nargs=REMAINDER)

    def run(self) -> None:
        """Run hf-lowbit in this process; it exits with its own status."""
        from hf_lowbit.cli import app

        assert self.args is not None
        app([self.COMMAND.name, *self.args.arguments], prog_name=f"{sys.argv[0].rpartition('/')[2]} lowbit")


class LowbitCommand(BaseOptimumCLICommand):
    """The group of commands."""

    COMMAND = CommandInfo(name="lowbit", help="Low-bit quantization with hf_lowbit.")
    SUBCOMMANDS = tuple(CommandInfo(name, text, ForwardedCommand) for name, text in _COMMANDS.items())


REGISTER_COMMANDS = [LowbitCommand]
