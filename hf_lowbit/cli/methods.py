"""``hf-lowbit methods``: what is installed, and the fields of one method."""

from __future__ import annotations

from dataclasses import MISSING, Field, asdict, fields, is_dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from hf_lowbit.cli.app import command
from hf_lowbit.cli.console import facts, print_json, screen, work

if TYPE_CHECKING:
    from hf_lowbit.method import Method

_NOT_SETTABLE = ("dataset", "plan", "provenance")


@command("methods")
def methods_command(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="Show this method's fields.", show_default=False)
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """List the installed methods, or the fields of one."""
    with work():
        from hf_lowbit.method import method_named, methods

        chosen = methods() if name is None else {name: method_named(name)}
        described = {key: describe_method(method) for key, method in chosen.items()}
    if json_output:
        print_json({"methods": described})
    elif name is None:
        _show_all(described)
    else:
        _show_one(name, described[name])


def describe_method(method: Method) -> dict[str, Any]:
    """Plain data about a method: what it is, the number formats, and every field that ``--set`` takes."""
    from hf_lowbit.formats import format_names

    return {
        "name": method.name,
        "summary": method.summary,
        "paper": method.paper,
        "domains": list(method.domains),
        "needs_data": method.needs_data,
        "formats": format_names(),
        "fields": {
            field.name: {"type": str(field.type), "default": _default(field)}
            for field in fields(method.config_class)
            if field.name not in _NOT_SETTABLE
        },
    }


def _default(field: Field[Any]) -> Any:
    value = field.default_factory() if field.default_factory is not MISSING else field.default
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value


def _show_all(described: dict[str, dict[str, Any]]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in ("method", "data", "domains", "what it is", "paper"):
        table.add_column(column, overflow="fold", no_wrap=column == "method")
    for name, values in described.items():
        data = "needed" if values["needs_data"] else "none"
        table.add_row(name, data, ", ".join(values["domains"]), escape(values["summary"]), escape(values["paper"]))
    screen().print(table)
    screen().print("\nhf-lowbit methods NAME lists a method's fields and number formats.")


def _show_one(name: str, values: dict[str, Any]) -> None:
    console = screen()
    console.print(f"[bold]{escape(name)}[/bold]: {escape(values['summary'])}\n")
    facts([("paper", values["paper"]), ("domains", ", ".join(values["domains"]))])
    console.print("\nnumber formats (--format)")
    facts(list(values["formats"].items()))
    console.print("\nfields (--set field=value)")
    facts([(f"{field} = {entry['default']!r}", entry["type"]) for field, entry in values["fields"].items()])
