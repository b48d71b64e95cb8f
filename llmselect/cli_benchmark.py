"""Commands of the benchmark: `llmselect benchmark GRID`, `llmselect leaderboard CELLS`."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Annotated

import typer

from llmselect.cli_complete import argument, recipes
from llmselect.cli_help import BENCHMARK, examples
from llmselect.errors import LlmselectError, UsageError

GridPath = Annotated[Path, argument("a YAML file, e.g. eval/benchmark/grid-small.yaml", "GRID", recipes)]
Overrides = Annotated[list[str] | None, argument("settings of the grid, e.g. vars.data=DIR seeds=[0]", "KEY=VALUE")]
Only = Annotated[list[str] | None, typer.Option(help="cells to run, e.g. method=trim,random; also model, target, budget, seed")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="print the cells done and missing and the time to expect")]
Json = Annotated[bool, typer.Option("--json", help="print JSON for a script")]


def add_to(app: typer.Typer) -> None:
    """Register the commands of this module."""
    small = "llmselect benchmark eval/benchmark/grid-small.yaml"
    app.command(rich_help_panel=BENCHMARK, epilog=examples(f"{small} --dry-run", f"{small} --only method=trim,random"))(benchmark)
    board = "llmselect leaderboard eval/benchmark/cells --out eval/benchmark/leaderboard.md"
    app.command(rich_help_panel=BENCHMARK, epilog=examples(board))(leaderboard)


def benchmark(grid: GridPath, overrides: Overrides = None, only: Only = None, dry_run: DryRun = False,
              as_json: Json = False) -> None:  # fmt: skip
    """Measure selectors over models, targets, budgets and seeds, at equal training tokens.

    A cell whose file exists is skipped, so a grid may stop, continue and grow; several of these commands may run at once.
    """
    warnings.filterwarnings("ignore", category=FutureWarning)
    from llmselect.benchmark import cells, outlook
    from llmselect.benchmark.grid import load_grid, parse_only

    plan = load_grid(grid, overrides or [])
    wanted = parse_only(only or [], plan)
    if dry_run:
        found = outlook.outlook(plan, wanted)
        typer.echo(json.dumps(found) if as_json else outlook.text(found, plan))
        return
    tally = cells.run_grid(plan, wanted)
    told = {"ran": len(tally.ran), "failed": {str(cell): why for cell, why in tally.failed.items()}, "cells": str(plan.results)}
    typer.echo(json.dumps(told) if as_json else f"{len(tally.ran)} cells measured here; all results in {plan.results}")
    if tally.failed:
        cell, why = next(iter(tally.failed.items()))
        raise LlmselectError(f"{len(tally.failed)} cells failed, the first: {cell}: {why}")


def leaderboard(cells: Annotated[Path, argument("folder of results, e.g. eval/benchmark/cells", "CELLS")],
                out: Annotated[Path | None, typer.Option(help="Markdown file to write; default: print it")] = None,
                ) -> None:  # fmt: skip
    """The table of methods from the results of `llmselect benchmark`."""
    from llmselect import atomic
    from llmselect.benchmark.leaderboard import leaderboard as made

    if not cells.is_dir():
        raise UsageError(f"cells: no folder {cells}; give the folder that `llmselect benchmark` writes")
    text = made(cells)
    if out is None:
        typer.echo(text)
    else:
        atomic.write_text(out, text)
        typer.echo(f"written: {out}")
