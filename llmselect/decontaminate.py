"""Does a pool row share text with an evaluation set?

Paper: 13-gram overlap as in Brown et al., "Language Models are Few-Shot Learners", arXiv 2005.14165, appendix C.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

NGRAM = 13
_WORD = re.compile(r"\w+")


def words(messages: Sequence[dict[str, str]]) -> list[str]:
    """Lower-case words of all turns."""
    return [w for m in messages for w in _WORD.findall(m["content"].lower())]


def prompt(messages: Sequence[dict[str, str]]) -> str:
    """The first user turn without case, blanks and punctuation."""
    first = next((m["content"] for m in messages if m["role"] == "user"), "")
    return " ".join(_WORD.findall(first.casefold()))


def ngrams(tokens: Sequence[str]) -> Iterator[str]:
    """The runs of `NGRAM` words."""
    return (" ".join(tokens[i : i + NGRAM]) for i in range(len(tokens) - NGRAM + 1))


@dataclass
class Contamination:
    """The n-grams and prompts of evaluation sets.

    A run of words that more than `boilerplate` of a set's rows (and at least three) share is the set's instruction
    template, not its content, and marks nothing.
    """

    boilerplate: float = 0.1
    grams: dict[str, str] = field(default_factory=dict[str, str])
    prompts: dict[str, str] = field(default_factory=dict[str, str])

    def add(self, rows: Iterable[Any]) -> Contamination:
        """Learn one evaluation set."""
        seen: Counter[str] = Counter()
        first: dict[str, str] = {}
        count = 0
        for row in rows:
            count += 1
            name = f"{row.get('group') or row['source']}/{row['id']}"
            if asked := prompt(row["messages"]):
                self.prompts.setdefault(asked, name)
            for gram in set(ngrams(words(row["messages"]))):
                seen[gram] += 1
                first.setdefault(gram, name)
        limit = max(3, self.boilerplate * count)
        self.grams.update({gram: first[gram] for gram, times in seen.items() if times < limit})
        return self

    def matches(self, messages: Sequence[dict[str, str]]) -> Iterator[tuple[str, str]]:
        """The evaluation rows that a row shares its prompt or a run of words with, and what it shares; one entry for each."""
        if (asked := prompt(messages)) and asked in self.prompts:
            yield self.prompts[asked], f"same prompt as {self.prompts[asked]}"
        for gram in ngrams(words(messages)):
            if gram in self.grams:
                yield self.grams[gram], f"shares {NGRAM} words with {self.grams[gram]}: {gram[:120]}"

    def find(self, messages: Sequence[dict[str, str]]) -> str | None:
        """Which evaluation row a pool row gives away, and how; None for a clean row."""
        return next((how for _, how in self.matches(messages)), None)
