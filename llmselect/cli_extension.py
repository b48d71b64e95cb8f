"""`hf llmselect …`: this installation as an extension of the hf CLI (huggingface_hub)."""

from __future__ import annotations

import shutil
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from llmselect.cli_help import MACHINE, examples
from llmselect.errors import LlmselectError, UsageError

NAME = "hf-llmselect"
# The hf CLI asks github.com for news of OWNER/hf-llmselect. No account there can begin with a hyphen, so nobody can answer.
OWNER = "-this-environment"


def add_to(app: typer.Typer) -> None:
    """Register the command of this module."""
    app.command("hf-extension", rich_help_panel=MACHINE, epilog=examples(
        "llmselect hf-extension",
        "hf llmselect list                  # the same as: llmselect list",
        "hf extensions remove llmselect     # takes it back",
    ))(hf_extension)  # fmt: skip


def hf_extension(force: Annotated[bool, typer.Option("--force", help="in place of an extension of that name")] = False) -> None:
    """Make `hf llmselect …` start this installation.

    The hf CLI knows only extensions in a folder of its own, not what is installed beside it. `hf extensions install` would
    fetch one from GitHub into an environment of its own, with a second torch; this command tells it of the one that is here.
    It writes one small file, by huggingface_hub's own code, and contacts nothing.
    """
    typer.echo(f"hf llmselect now starts {register(force)}")


def register(force: bool = False) -> Path:
    """Write the manifest that makes the hf CLI start this environment's `hf-llmselect`; returns what it starts.

    Errors: `LlmselectError` where huggingface_hub has no such extensions or the executable is not installed; `UsageError`
    when there is an extension of that name and not `force`.
    """
    try:
        from huggingface_hub.cli import extensions
    except ImportError as error:
        raise LlmselectError("this huggingface_hub has no extensions; type: pip install -U huggingface_hub") from error
    beside = Path(sys.executable).parent
    executable = shutil.which(NAME, path=str(beside)) or shutil.which(NAME)
    if executable is None:
        raise LlmselectError(f"there is no {NAME} in {beside}; type: pip install llmselect")
    root: Any = extensions.EXTENSIONS_ROOT
    folder = root.expanduser() / NAME
    if folder.exists() and not force:
        raise UsageError(f"{folder} is there already; to replace it, type: llmselect hf-extension --force")
    manifest = extensions.ExtensionManifest(
        owner=OWNER, repo=NAME, repo_id=f"{OWNER}/{NAME}", short_name="llmselect", executable_path=executable,
        type="binary", installed_at=datetime.now(UTC), description="Choose the data to fine-tune a language model on.",
    )  # fmt: skip
    if folder.exists():
        shutil.rmtree(folder)
    manifest.save(folder)
    return Path(executable)
