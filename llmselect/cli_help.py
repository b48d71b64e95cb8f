"""How help is written: commands in groups, examples at the end. Plain text, which needs no rich and is quick to make."""

from __future__ import annotations

from typing import Any

from typer.core import TyperGroup

# In the order of a first day with the tool. A command names its group by `rich_help_panel`.
RUN, METHODS, RESULTS = "Run a recipe", "Methods", "Look at results and share them"
MODELS, BENCHMARK, MACHINE = "One model", "Compare selectors at scale", "This machine"
GROUPS = (RUN, METHODS, RESULTS, MODELS, BENCHMARK, MACHINE)


class Commands(TyperGroup):
    """A group of commands whose help lists them under headings, each with its first sentence in full."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command. Who types a setting as an option (`--budget 5%`) is told how it is typed."""
        try:
            return super().invoke(ctx)
        except Exception as error:
            name, asked = getattr(error, "option_name", None), getattr(error, "ctx", None)
            unlike = type(error).__name__ == "NoSuchOption" and not getattr(error, "possibilities", None)
            if name and asked and unlike and any(one.name == "overrides" for one in asked.command.params):
                setting = f"{name.lstrip('-').replace('-', '_')}=…"
                told = f"No such option: {name}. A setting of the recipe is typed without dashes: {setting}"
                vars(error)["message"] = told
            raise

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the headings of `GROUPS` that have commands, then what has none."""
        found: dict[str, list[tuple[str, str]]] = {name: [] for name in (*GROUPS, "Commands")}
        for name in self.list_commands(ctx):
            command = self.get_command(ctx, name)
            if command is not None and not command.hidden:
                panel = getattr(command, "rich_help_panel", None)
                found[panel if panel in GROUPS else "Commands"].append((name, first_sentence(command.help or "")))
        for heading, rows in found.items():
            if rows:
                with formatter.section(heading):
                    formatter.write_dl(rows)


def first_sentence(text: str) -> str:
    """The first paragraph of a docstring in one line, up to its first full stop that ends a sentence."""
    paragraph = " ".join(text.split("\n\n", 1)[0].split())
    return paragraph.split(". ", 1)[0].removesuffix(".")


def examples(*lines: str) -> str:
    """The end of a command's help: command lines as they are typed, never wrapped."""
    return "Examples:\n\n\b\n" + "\n".join(f"  {line}" for line in lines)
