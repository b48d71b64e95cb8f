"""The command `llmselect push`: selections, features and adapters of a run to the Hugging Face Hub."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from llmselect.cli_complete import RunFolder, argument
from llmselect.cli_help import RESULTS, examples


def add_to(app: typer.Typer) -> None:
    """Register the command of this module."""
    app.command(rich_help_panel=RESULTS, epilog=examples(
        "llmselect push runs/quickstart me/subset --dry-run                 # card and files; contacts nothing",
        "llmselect push runs/quickstart me/subset --method trim --private   # after `hf auth login`",
    ))(push)  # fmt: skip


def push(run: RunFolder,
         repo: Annotated[str, argument("dataset on the Hub: OWNER/NAME, or NAME for your own", "REPO")],
         method: Annotated[list[str] | None, typer.Option(help="only this method; may be repeated")] = None,
         create_pr: Annotated[bool, typer.Option("--create-pr", help="open a pull request")] = False,
         private: Annotated[bool, typer.Option("--private", help="refused if the repository is there and public")] = False,
         dry_run: Annotated[bool, typer.Option("--dry-run", help="print card and files; contacts nothing")] = False,
         features: Annotated[bool, typer.Option("--features", help="also the feature store, as files")] = False,
         adapters: Annotated[bool, typer.Option("--adapters", help="also the adapters, as a model of the same id")] = False,
         base_model: Annotated[str | None, typer.Option(help="Hub id of the model, where the run's is a folder")] = None,
         as_json: Annotated[bool, typer.Option("--json", help="print JSON for a script")] = False) -> None:  # fmt: skip
    """Push the selections of a run to the Hub, as a dataset with a card.

    The same command again pushes nothing new. The token comes from `hf auth login` or `HF_TOKEN`.
    """
    from llmselect import hub

    reports = hub.push_run(run, repo, methods=method or None, private=private, create_pr=create_pr, dry_run=dry_run,
                           features=features, adapters=adapters, base_model=base_model)  # fmt: skip
    if as_json:
        typer.echo(json.dumps([report.plain() for report in reports]))
        return
    for report in reports:
        typer.echo(report.text())
