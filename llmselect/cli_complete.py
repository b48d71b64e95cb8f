"""What the Tab key completes, and the command that prints a shell's script for it: `llmselect completion bash`."""

from __future__ import annotations

import importlib
import logging
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from llmselect.cli_help import MACHINE, examples
from llmselect.errors import UsageError, nearest

SHELLS = ("bash", "zsh", "fish")
VARIABLE = "_LLMSELECT_COMPLETE"  # set by the scripts; typer answers with words instead of running a command


def add_to(app: typer.Typer) -> None:
    """Register the command of this module."""
    app.command(
        rich_help_panel=MACHINE,
        epilog=examples(
            """eval "$(llmselect completion bash)"             # in ~/.bashrc""",
            """eval "$(llmselect completion zsh)"              # in ~/.zshrc, after compinit""",
            "llmselect completion fish > ~/.config/fish/completions/llmselect.fish",
        ),
    )(completion)


def prepare() -> None:
    """Make typer know its shells, only where a shell asks: it costs imports that no other command needs."""
    if VARIABLE in os.environ:
        logging.disable()  # a warning would stand on the user's half-typed line
        _typer().completion_init()


def completion(shell: Shell) -> None:
    """Print the script with which a shell completes commands, options, methods, recipes and runs."""
    if shell not in SHELLS:
        raise UsageError(f"completion: no script for '{shell}'.{nearest(shell, SHELLS)} One of: {', '.join(SHELLS)}")
    typer.echo(_typer().get_completion_script(prog_name="llmselect", complete_var=VARIABLE, shell=shell))


def _typer() -> Any:
    # By name: typer moved these functions between versions, and this module, which does not list them, has them in all.
    return importlib.import_module("typer.completion")


def methods(incomplete: str) -> list[str]:
    """Names for `llmselect show`: selectors, extractors and schedules."""
    from llmselect import registry

    kinds = (registry.selectors, registry.extractors, registry.schedules)
    return sorted({name for kind in kinds for name in kind.names() if name.startswith(incomplete)})


def recipes(incomplete: str) -> list[str]:
    """Recipes: YAML files, folders with a `recipe.yaml`, and folders on the way to one."""
    return _places(incomplete, "recipe.yaml", (".yaml", ".yml"))


def runs(incomplete: str) -> list[str]:
    """Folders of runs (they hold a `config.yaml`), and folders on the way to one."""
    return _places(incomplete, "config.yaml", ())


def _places(incomplete: str, marker: str, endings: tuple[str, ...]) -> list[str]:
    """What begins with `incomplete` and is a folder holding `marker` or a file with one of `endings`; beside these, folders.

    Nothing when none is found: the shell then completes file names itself, and rightly adds no space to a folder.
    """
    typed, _, start = incomplete.rpartition("/")
    folder = Path(typed + "/" if incomplete.startswith("/") else typed).expanduser()
    found: list[str] = []
    onward: list[str] = []
    try:
        inside = sorted(folder.iterdir())
    except OSError:
        return []
    for path in inside:
        if not path.name.startswith(start) or (path.name.startswith(".") and not start):
            continue
        shown = f"{typed}/{path.name}" if "/" in incomplete else path.name
        if path.is_dir():
            (found if (path / marker).is_file() else onward).append(shown if (path / marker).is_file() else f"{shown}/")
        elif path.name.endswith(endings or "\0"):
            found.append(shown)
    return found + onward if found else []


def argument(help: str, metavar: str, complete: Any = None) -> Any:
    """A positional argument under the name that its help shows."""
    return typer.Argument(help=help, metavar=metavar, autocompletion=complete)


RecipePath = Annotated[Path, argument("a recipe file, or a folder that holds recipe.yaml", "RECIPE", recipes)]
Overrides = Annotated[list[str] | None, argument("settings of the recipe, e.g. budget=10% train.tokens=100000", "KEY=VALUE")]
RunFolder = Annotated[Path, argument("folder of a run", "RUN", runs)]
RunFolders = Annotated[list[Path], argument("folders of runs", "RUN", runs)]
Shell = Annotated[str, argument(", ".join(SHELLS), "SHELL", lambda: list(SHELLS))]
Json = Annotated[bool, typer.Option("--json", help="print JSON for a script")]
