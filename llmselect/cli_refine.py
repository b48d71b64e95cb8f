"""The command `llmselect refine`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def add_to(app: typer.Typer) -> None:
    """Register the command of this module."""
    app.command()(refine)


def refine(recipe: Annotated[Path, typer.Argument(help="a recipe file, or a folder that holds recipe.yaml")],
           overrides: Annotated[list[str] | None, typer.Argument(help="key=value settings, e.g. refine.rounds=4")] = None,
           dry_run: Annotated[bool, typer.Option("--dry-run", help="check, and print rows, trainings and answers")] = False,
           as_json: Annotated[bool, typer.Option("--json", help="print JSON for a script")] = False) -> None:  # fmt: skip
    """Select in rounds of fine-tuning, answering and scoring (the recipe's `refine:` section); resumes.

    Example: `llmselect refine recipes/iterative vars.data=DIR vars.model=DIR`. `llmselect run` does this too, and then
    trains and compares the selection with those of other methods.
    """
    import warnings

    from llmselect import prepare, refine_stage, stages
    from llmselect import recipe as recipes

    plan = recipes.load_recipe(recipe, overrides)
    refine_stage.section(plan)
    if dry_run:
        expected = refine_stage.expected(plan)
        typer.echo(json.dumps(expected) if as_json else refine_stage.text(expected))
        return
    warnings.filterwarnings("ignore", category=FutureWarning)  # of libraries about each other, not for this user
    run = stages.Run(plan)
    for stage in (prepare.prepare, stages.extract_stage, refine_stage.refine_stage):
        stage(run)
    if run.process.is_main_process:
        found = refine_stage.report(run)
        typer.echo(json.dumps(found) if as_json else refine_stage.report_text(found))
