"""The papers behind methods, as BibTeX: what their docstrings cite, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterable

from llmselect.errors import UsageError
from llmselect.registry import Registry, describe

_NUMBER = re.compile(r"(?<![\d.])\d{4}\.\d{4,5}(?!\d)")
_TITLED = re.compile(r'"([^"]+)",? arXiv (\d{4}\.\d{4,5})')
_SPECIAL = {ord(one): f"\\{one}" for one in "&%$#_{}"}


def bibtex(methods: Iterable[tuple[Registry, str]]) -> str:
    """BibTeX of the arXiv papers in the `Paper:` sections of `methods`; empty when there are none.

    A title is given where the docstring quotes it. Methods of packages that are not installed are left out.
    """
    titles: dict[str, str] = {}
    users: dict[str, list[str]] = {}
    for registry, name in methods:
        try:
            paper = describe(registry.get(name)).get("Paper", "")
        except UsageError:
            continue
        if paper.lower().startswith("none"):
            continue  # numbers that follow are remarks, not the source of the method
        titles |= {number: title for title, number in _TITLED.findall(paper)}
        for number in dict.fromkeys(_NUMBER.findall(paper)):
            users.setdefault(number, []).append(name)
    return "\n\n".join(_entry(number, titles.get(number), users[number]) for number in sorted(users))


def _entry(number: str, title: str | None, users: list[str]) -> str:
    named = (title or f"arXiv:{number}").translate(_SPECIAL)
    used = ", ".join(dict.fromkeys(users)).translate(_SPECIAL)
    fields = {"title": f"{{{named}}}", "eprint": number, "archivePrefix": "arXiv", "year": f"20{number[:2]}",
              "url": f"https://arxiv.org/abs/{number}", "note": f"method: {used}"}  # fmt: skip
    return f"@misc{{arxiv-{number},\n" + ",\n".join(f"  {key} = {{{value}}}" for key, value in fields.items()) + "\n}"
