"""Writes the parts of the documents that follow from the methods' own docstrings; tests fail while they are stale.

    python recipes/generated.py           # or `make docs`

A part stands between `<!-- generated: KIND … -->` and `<!-- end -->`: `methods selector` (or extractor, schedule) is a table of
all methods of a kind, `deviations NAME …` what methods do otherwise than their papers. `llmselect show NAME` prints the source.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmselect.registry import Registry, describe, extractors, schedules, selectors

ROOT = Path(__file__).parents[1]
DOCUMENTS = ("README.md", "recipes/papers.md")
KINDS: dict[str, Registry] = {kind.kind: kind for kind in (selectors, extractors, schedules)}
PART = re.compile(r"(<!-- generated: ([^>]*?) -->\n).*?(<!-- end -->)", re.DOTALL)
ARXIV = re.compile(r"(?<![\d.])(\d{4}\.\d{4,5})(?!\d)")
HEAD = "| name | what | paper | needs | cost | when to use |\n|---|---|---|---|---|---|\n"


def methods(kind: str) -> str:
    """The table of a kind: a line per file, so that methods of one file share theirs."""
    lines: dict[str, list[str]] = {}
    for name, cls in own(KINDS[kind]):
        lines.setdefault(cls.__module__, []).append(name)
    return HEAD + "".join(_line(names, describe(KINDS[kind].get(names[0]))) for names in lines.values())


def own(registry: Registry) -> Iterator[tuple[str, type]]:
    """The methods that are part of llmselect; those of other installed packages are not."""
    for name in registry.names():
        if (cls := registry.get(name)).__module__.startswith("llmselect."):
            yield name, cls


def _line(names: list[str], about: dict[str, Any]) -> str:
    cells = [", ".join(f"`{name}`" for name in names), about["title"].rstrip("."), links(about["Paper"]),
             first(about["Inputs"]), first(about["Cost"]), about["Use"].rstrip(".")]  # fmt: skip
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def first(text: str) -> str:
    """The first sentence; a full stop inside a number or an abbreviation ends none."""
    return re.split(r"(?<=[^.\s][^.\sA-Z])\. (?=[A-Z`])", text, maxsplit=1)[0].rstrip(".")


def numbers(paper: str) -> list[str]:
    """The arXiv numbers that a Paper section names as a source; numbers after `none` are remarks."""
    return [] if paper.lower().startswith("none") else list(dict.fromkeys(ARXIV.findall(paper)))


def links(paper: str) -> str:
    """The papers as links; words where the source has no arXiv number, a dash where there is none."""
    found = [f"[{number}](https://arxiv.org/abs/{number})" for number in numbers(paper)]
    return ", ".join(found) or ("–" if paper.lower().startswith("none") else first(paper))


def deviations(names: list[str]) -> str:
    """What each method does otherwise than its paper."""
    told = []
    for name in names:
        registry = next((kind for kind in KINDS.values() if name in kind.names()), None)
        if registry is None:
            raise SystemExit(f"no method '{name}': a marker `<!-- generated: deviations … -->` names it")
        told.append(f"- `{name}`: {describe(registry.get(name))['Deviations']}\n")
    return "".join(told)


def rendered(text: str) -> str:
    """A document with its generated parts made anew."""

    def part(found: re.Match[str]) -> str:
        kind, *names = found[2].split()
        made = {"methods": lambda: methods(*names), "deviations": lambda: deviations(names)}[kind]()
        return f"{found[1]}{made}{found[3]}"

    return PART.sub(part, text)


def main() -> None:
    for name in DOCUMENTS:
        file = ROOT / name
        text = file.read_text("utf-8")
        if (made := rendered(text)) != text:
            file.write_text(made, "utf-8")
            print(f"written: {name}")


if __name__ == "__main__":
    main()
