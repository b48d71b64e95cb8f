"""The code blocks of the documents, and whether the command lines in them could be typed as they stand."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SLURM = {"--nodes", "--gpus-per-node", "--time", "--partition", "--account"}


@dataclass(frozen=True)
class Block:
    """A fenced block: where it stands, its language, its text."""

    file: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


def documents() -> list[Path]:
    """The documents whose blocks must run."""
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "recipes").rglob("*.md"))]


def blocks(*languages: str) -> list[Block]:
    """All blocks of some languages, or all of all."""
    found = []
    for file in documents():
        text = file.read_text("utf-8")
        for one in FENCE.finditer(text):
            line = text.count("\n", 0, one.start()) + 2
            found.append(Block(str(file.relative_to(ROOT)), line, one[1], one[2]))
    return [block for block in found if not languages or block.language in languages]


def commands(text: str) -> Iterator[list[str]]:
    """The words of every command; `a|b` in the place of one word are two commands."""
    for line in text.replace("\\\n", " ").splitlines():
        command: list[str] = []
        for word in [*shlex.split(line, comments=True), "&&"]:
            if word != "&&":
                command.append(word)
            elif command:
                yield from _alternatives(command)
                command = []


def _alternatives(words: list[str]) -> Iterator[list[str]]:
    while words and re.fullmatch(r"\w+=\S*", words[0]):  # settings of the environment
        words = words[1:]
    at = next((i for i, word in enumerate(words[:3]) if re.fullmatch(r"\w+(\|\w+)+", word)), None)
    if at is None:
        yield words
    else:
        yield from ([*words[:at], one, *words[at + 1 :]] for one in words[at].split("|"))


def check(words: list[str]) -> list[list[str]]:
    """Refuse what cannot be typed; returns the `llmselect` commands, those inside launchers among them, without the program.

    Errors: `AssertionError`, or what the parser of the program raises.
    """
    program, *rest = words
    if program == "llmselect":
        parse_llmselect(rest)
        return [rest]
    if words[:2] == ["accelerate", "launch"]:
        from accelerate.commands.launch import launch_command_parser

        told = launch_command_parser().parse_args(rest[1:])
        assert told.module and told.training_script == "llmselect", f"{words}: not -m llmselect"
        assert (ROOT / told.config_file.lstrip("/")).is_file(), f"no file {told.config_file}"
        return check(["llmselect", *told.training_script_args])
    if program == "hf":
        from huggingface_hub.cli.hf import app

        told = parse(app, rest)
        script = told.params.get("command") or []
        return [one for inner in commands(script[-1]) for one in check(inner)] if script[:2] == ["bash", "-c"] else []
    checks = {"make": _make, "python": _python, "pip": _pip, "sbatch": _sbatch, ".ci/run": _nothing, ".venv/bin/python": _pytest}
    checks["jupyter"] = _jupyter
    checks[program](rest)
    return []


def parse_llmselect(words: list[str]) -> None:
    """Parse a command by the real command line, and look for the files of the repository that it names."""
    from llmselect.cli import app

    parse(app, words)
    for word in words:
        place = ROOT / word.lstrip("/")
        if word.lstrip("/").startswith(("recipes/", "eval/")) and "--out" not in words:
            assert place.exists(), f"{' '.join(words)}: no {word}"


def parse(app: Any, words: list[str]):
    """The context of the command that `words` call: every group, command, argument and option exists, nothing has run."""
    from typer import Typer
    from typer.main import get_command

    command, context, rest = get_command(app) if isinstance(app, Typer) else app, None, list(words)
    name = "app"
    while hasattr(command, "resolve_command"):
        assert rest, f"{words}: no command after {name}"
        context = command.make_context(name, list(rest), parent=context)
        name, command, rest = command.resolve_command(context, rest)
    return command.make_context(name, list(rest), parent=context)


def _make(rest: list[str]) -> None:
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    assert {word for word in rest if "=" not in word} <= set(targets), f"make {rest}: targets are {targets}"


def _python(rest: list[str]) -> None:
    source = (ROOT / rest[0]).read_text("utf-8")
    for option in (word for word in rest[1:] if word.startswith("--")):
        assert f'"{option}"' in source, f"{rest[0]} takes no {option}"


def _pytest(rest: list[str]) -> None:
    assert rest[:2] == ["-m", "pytest"], rest


def _pip(rest: list[str]) -> None:
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    assert rest[0] in ("install", "wheel"), rest
    for word in rest:
        for names in re.findall(r"llmselect\S*\[([\w,]+)\]", word):
            assert set(names.split(",")) <= set(extras), f"{word}: extras are {list(extras)}"


def _jupyter(rest: list[str]) -> None:
    assert rest[0] == "lab" and (ROOT / rest[1]).is_dir(), rest


def _sbatch(rest: list[str]) -> None:
    options = [word.split("=")[0] for word in rest if word.startswith("--")]
    script = next(word for word in rest if not word.startswith("--"))
    assert set(options) <= SLURM and (ROOT / script).is_file(), rest
    for word in rest[rest.index(script) + 1 :]:
        assert "=" in word or (ROOT / word).is_file(), f"no recipe {word}"


def _nothing(rest: list[str]) -> None:
    assert not rest, rest
