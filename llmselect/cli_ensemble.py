"""The command `llmselect ensemble`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from llmselect.cli_complete import argument
from llmselect.cli_complete import runs as complete_runs
from llmselect.cli_help import RESULTS, examples
from llmselect.errors import UsageError


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    example = "llmselect ensemble runs/quickstart --methods trim,rds+,mona --how rrf --out fused"
    app.command(rich_help_panel=RESULTS, epilog=examples(example))(ensemble)


def ensemble(runs: Annotated[list[Path], argument("folders of runs that have selected from one pool", "RUN", complete_runs)],
             out: Annotated[str, typer.Option(help="name of the selection, beside the methods of the first run")],
             methods: Annotated[str | None, typer.Option(help="names with commas between; default: all of each run")] = None,
             how: Annotated[str, typer.Option(help="borda, rrf (reciprocal ranks) or round_robin",
                                             autocompletion=lambda: ["borda", "rrf", "round_robin"])] = "borda",
             budget: Annotated[str | None, typer.Option(help='rows, "5%" or tokens:200000; default: that of the methods')] = None,
             as_json: Annotated[bool, typer.Option("--json", help="print JSON for a script")] = False) -> None:  # fmt: skip
    """One selection from several: ranks added up, or turns between the methods.

    There is one for each seed; training and reports take it like a method of the first run.
    """
    from llmselect.ensemble import How, ensemble_runs
    from llmselect.selection import Selection

    names = [name.strip() for name in methods.split(",") if name.strip()] if methods else None
    if methods is not None and not names:
        raise UsageError(f"methods: {methods!r} names none; give names with commas between, or leave it out for all")
    size: Any = budget
    if budget is not None and budget.startswith("tokens:"):
        if not budget[7:].isdecimal():
            raise UsageError(f"budget: {budget!r} is no number of tokens; type for example --budget tokens:200000")
        size = {"tokens": int(budget[7:])}
    written = ensemble_runs(runs, names, cast(How, how), out, size)
    told = [{"folder": str(place), "rows": len(Selection.load(place))} for place in written]
    typer.echo(json.dumps(told) if as_json else "\n".join(f"{one['rows']} rows in {one['folder']}" for one in told))
