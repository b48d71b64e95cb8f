"""The command `llmselect refine`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from llmselect.cli_complete import Overrides, RecipePath
from llmselect.cli_help import RUN, examples


def add_to(app: typer.Typer) -> None:
    """Register the command of this module."""
    app.command(rich_help_panel=RUN, epilog=examples(
        "llmselect refine recipes/iterative vars.data=DIR vars.model=DIR --dry-run",
        "llmselect refine recipes/iterative vars.data=DIR vars.model=DIR refine.rounds=4",
    ))(refine)  # fmt: skip


def refine(recipe: RecipePath, overrides: Overrides = None,
           dry_run: Annotated[bool, typer.Option("--dry-run", help="check, and print rows, trainings and answers")] = False,
           as_json: Annotated[bool, typer.Option("--json", help="print JSON for a script")] = False) -> None:  # fmt: skip
    """Select in rounds of fine-tuning, answering and scoring; resumes.

    The recipe's `refine:` section says how. `llmselect run` does this too, and then trains on the selection and compares it
    with those of other methods.
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
