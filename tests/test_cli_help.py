"""Help that teaches: every command in a group, with examples that parse; and quick to come, since nothing heavy is imported."""

from __future__ import annotations

import shlex
import subprocess
import sys

import pytest
import typer

from llmselect import cli
from llmselect.cli_help import GROUPS, first_sentence

HEAVY = "torch transformers datasets numpy scipy numba pyarrow sklearn huggingface_hub rich jinja2 psutil yaml".split()
APP = typer.main.get_command(cli.app)


def commands(group=APP, path=("llmselect",)) -> dict[tuple[str, ...], typer.core.TyperCommand]:
    """Every command that can be run, by the words that run it."""
    found = {}
    for name, command in group.commands.items():
        inside = hasattr(command, "commands")
        found |= commands(command, (*path, name)) if inside else {(*path, name): command}
    return found


COMMANDS = commands()


def parse(line: str):
    """The context of a command line, which is parsed and not run."""
    words, command = shlex.split(line, comments=True)[1:], APP
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    return command.make_context(line, words)


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_command_explains_itself_and_its_examples_parse(path):
    command = COMMANDS[path]
    assert first_sentence(command.help or "") and all(p.help for p in command.params), "a sentence, and one for each parameter"
    lines = [line.strip() for line in (command.epilog or "").splitlines() if line.startswith("  ")]
    own = [line for line in lines if line.startswith(" ".join(path))]
    assert own or path[-1] == "completion", f"no example of {' '.join(path)}"
    for line in own:
        parse(line.split(" > ")[0])


def test_a_wrong_example_would_be_seen():
    with pytest.raises(Exception, match="No such option"):
        parse("llmselect push runs/a me/subset --metod trim")
    with pytest.raises(Exception, match="Missing"):
        parse("llmselect show")


def test_the_overview_has_all_commands_under_headings_in_order():
    context = APP.make_context("llmselect", ["list"])
    text = APP.get_help(context)
    places = [text.index(f"\n{heading}:") for heading in GROUPS]
    assert places == sorted(places) and "\nCommands:" not in text, "every command names its group"
    for path in COMMANDS:
        assert f"\n  {path[1]} " in text
    assert "..." not in text[places[0] :], "first sentences stand in full"
    examples = [line.strip() for line in (APP.epilog or "").splitlines() if line.startswith("  ")]
    assert len(examples) >= 4 and all(parse(line) for line in examples)


def test_first_sentence():
    assert first_sentence("One line of\ntwo. More.\n\nRest.") == "One line of two"
    assert first_sentence("Features of `eval/suites.yaml`.") == "Features of `eval/suites.yaml`"


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["--version"], ["completion", "bash"]], ids=" ".join)
def test_help_imports_nothing_heavy(arguments):
    seen = f"print(end.code or 0, *[m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr)"
    start = f"import sys; sys.argv = ['llmselect', *{arguments!r}]\nfrom llmselect.cli import main"
    code = f"{start}\ntry: main()\nexcept SystemExit as end: {seen}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stderr.split() == ["0"] and done.stdout.strip()
