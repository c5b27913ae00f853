"""What a user sees of an error: one line on stderr and an exit code.

Exit code 2: what was asked for cannot be (a wrong name or field, an output folder that is taken, a damaged or missing
model). Exit code 1: it failed while it was being done.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import typer

# By name, so that the command line does not import the libraries that define them.
_REQUEST_ERRORS = {
    "ConfigError",
    "CorruptWeightError",
    "DataError",
    "EntryNotFoundError",
    "FileExistsError",
    "FileNotFoundError",
    "GatedRepoError",
    "HFValidationError",
    "ImportError",
    "IsADirectoryError",
    "NotADirectoryError",
    "PermissionError",
    "PlacementError",
    "PlanError",
    "PromptError",
    "RepositoryNotFoundError",
    "RequestError",
    "ResumeError",
    "SourceError",
    "SpecError",
    "TaskError",
}
_OWN_WORDS = _REQUEST_ERRORS | {"FetchError", "OSError", "QuantizationError", "ValueError"}


class RequestError(ValueError):
    """A request on the command line that cannot be fulfilled."""


@contextmanager
def error_policy(debug: bool) -> Iterator[None]:
    """Turn exceptions into ``error: ...`` on stderr and the exit code 1 or 2; with ``debug`` after their traceback."""
    try:
        yield
    except (typer.Exit, typer.Abort, typer.BadParameter, BrokenPipeError):
        raise
    except Exception as error:
        if debug:
            traceback.print_exc(file=sys.stderr)
        typer.echo(f"error: {one_line(error)}", err=True)
        raise typer.Exit(exit_code(error)) from None


def exit_code(error: Exception) -> int:
    """2 for a request that cannot be fulfilled, 1 for a failure during the work."""
    if _names(error) & _REQUEST_ERRORS:
        return 2
    # transformers reports a model that is not there by an OSError of its own, without the system's error number
    missing = type(error) is OSError and error.errno is None
    return 2 if missing else 1


def one_line(error: Exception) -> str:
    """The message without line breaks; an unexpected error is named and points to ``--debug``."""
    message = " ".join(str(error).split()) or "no message"
    if _names(error) & _OWN_WORDS:
        return message
    return f"{type(error).__name__}: {message} (--debug shows where)"


def _names(error: Exception) -> set[str]:
    return {cls.__name__ for cls in type(error).__mro__}
