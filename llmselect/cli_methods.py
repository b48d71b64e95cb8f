"""The commands `llmselect list` and `llmselect show`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from llmselect.cli_complete import Json, argument, methods
from llmselect.cli_help import METHODS, examples


def add_to(app: typer.Typer) -> None:
    """Register the commands of this module."""
    app.command("list", rich_help_panel=METHODS, epilog=examples("llmselect list", "llmselect list --json"))(list_methods)
    app.command(rich_help_panel=METHODS, epilog=examples("llmselect show trim", "llmselect show similarity --json"))(show)


def list_methods(as_json: Json = False) -> None:
    """The selectors, extractors and schedules, each with what it does.

    Those of other installed packages are among them.
    """
    from llmselect.registry import describe, extractors, schedules, selectors

    kinds = (selectors, extractors, schedules)
    found = {kind.kind: {n: describe(kind.get(n))["title"] for n in kind.names()} for kind in kinds}
    if as_json:
        typer.echo(json.dumps(found))
        return
    for kind, titles in found.items():
        typer.echo(f"{kind}s")
        for name, title in titles.items():
            typer.echo(f"  {name:<14} {title}")
    typer.echo("\nllmselect show NAME tells a method's formula, inputs, cost and paper.")


def show(name: Annotated[str, argument("a name that `llmselect list` tells", "METHOD", methods)], as_json: Json = False) -> None:
    """One method's formula, inputs, cost, paper and parameters."""
    from llmselect.errors import UsageError, nearest
    from llmselect.registry import SECTIONS, describe, elsewhere, extractors, schedules, selectors

    homes = {name: kind for kind in (schedules, extractors, selectors) for name in kind.names()}
    if name not in homes:
        raise UsageError(f"no method '{name}'.{elsewhere(name) or nearest(name, homes)} One of: {', '.join(homes)}")
    about = describe(homes[name].get(name))
    if as_json:
        typer.echo(json.dumps(about, default=str))
        return
    typer.echo(f"{name}: {about['title']}\n")
    for section in SECTIONS:
        typer.echo(f"{section}: {about.get(section, '-')}\n")
    typer.echo("Parameters")
    for one in about["parameters"]:
        typer.echo(f"  {one['name']:<16} {one['default']!s:<14} {one['help'] or one['type']}")
