"""The application object, and the decorator that makes a function one of its commands."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import typer

from hf_lowbit.cli.errors import error_policy

F = TypeVar("F", bound=Callable[..., None])

app = typer.Typer(
    name="hf-lowbit",
    help="Low-bit quantization for the Hugging Face ecosystem: language, speech, diffusion and state-space models.",
    epilog="Start with: hf-lowbit quickstart",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

_DEBUG = Annotated[bool, typer.Option("--debug", help="On an error, show where it happened.")]


def command(name: str) -> Callable[[F], F]:
    """Register a function as a command: its errors become one line and an exit code, and it gets ``--debug``."""

    def register(function: F) -> F:
        @functools.wraps(function)
        def guarded(*args: Any, debug: bool = False, **kwargs: Any) -> None:
            with error_policy(debug):
                function(*args, **kwargs)

        signature = inspect.signature(function, eval_str=True)
        parameter = inspect.Parameter("debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=_DEBUG)
        guarded.__signature__ = signature.replace(parameters=[*signature.parameters.values(), parameter])  # type: ignore[attr-defined]
        guarded.__annotations__ = {**function.__annotations__, "debug": _DEBUG}
        app.command(name)(guarded)
        return function

    return register


def _show_version(wanted: bool) -> None:
    if wanted:
        from hf_lowbit import __version__

        typer.echo(f"hf-lowbit {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Options before the command's name."""
