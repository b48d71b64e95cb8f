"""Does a pool row share text with an evaluation set?

Paper: 13-word overlap as in Brown et al., "Language Models are Few-Shot Learners", arXiv 2005.14165, appendix C.
"""

from __future__ import annotations

import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np

NGRAM = 13
TEMPLATE = 5
_WORD = re.compile(r"\w+")
_BASE = 0x9E3779B97F4A7C15

Message = dict[str, str]


def words(messages: Sequence[Message]) -> list[str]:
    """Lower-case words (runs of `\\w`) of all turns, one after another."""
    return _WORD.findall("\n".join([m["content"] for m in messages]).lower())


@cache
def _punctuation() -> dict[int, str]:
    points = range(sys.maxunicode + 1)
    return {point: " " for point in points if unicodedata.category(chr(point)).startswith("P")}


def prompt(messages: Sequence[Message]) -> str:
    """The first user turn, case-folded, punctuation (Unicode class P) and runs of blanks as one space."""
    first = next((m["content"] for m in messages if m["role"] == "user"), "")
    return " ".join(first.casefold().translate(_punctuation()).split())


def _hashes(ids: np.ndarray, size: int) -> np.ndarray:
    """A 64-bit polynomial hash of every run of `size` word ids: uint64 [len - size + 1]."""
    mixed = ids.astype(np.uint64) * np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(0x94D049BB133111EB)
    count = max(0, len(ids) - size + 1)
    total = np.zeros(count, np.uint64)
    for j in range(size):
        total = total * np.uint64(_BASE) + mixed[j : j + count]
    return total


def _any(flags: np.ndarray, size: int) -> np.ndarray:
    """Whether any of the `size` flags from each place on is set: bool [len - size + 1]."""
    total = np.concatenate([[0], np.cumsum(flags)])
    return total[size:] != total[:-size] if len(total) > size else np.zeros(0, bool)


def _is_template(times: np.ndarray | int, rows: int, boilerplate: float) -> Any:
    return (times >= 3) & (times > boilerplate * rows)


@dataclass
class Contamination:
    """The 13-word runs and the prompts of evaluation sets, and which pool rows repeat one.

    A pool row is contaminated when its words contain a run of 13 words of an evaluation row (all turns of both), or when
    its first user turn is an evaluation row's first user turn but for case, blanks and punctuation.

    Args:
        boilerplate: evaluation sets wrap every row in the same instructions ("Write a bash command for the following
            task: …"). A run of `TEMPLATE` = 5 words, or a whole first prompt, that more than this share of a set's rows
            (and at least three) contain is such a template, not content: 13-word runs containing one mark nothing. Without
            this rule a template and five common words after it would drop the very rows that resemble the task.
            1 turns the rule off.

    Memory: 16 bytes for each 13-word run; hits are compared word by word, so a hash collision drops nothing.
    Text without blanks between words (Chinese, Thai) has few runs of 13 words: there, the prompt rule does the work.
    """

    boilerplate: float = 0.1
    sets: list[Any] = field(default_factory=list)
    vocabulary: dict[str, int] = field(default_factory=dict)
    prompts: dict[str, tuple[int, int]] = field(default_factory=dict)
    grams: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))
    places: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    def add(self, rows: Any) -> Contamination:
        """Learn one evaluation set: a `Dataset` or list of rows with `id`, `messages`, `source` (or `group`)."""
        ids, owner, asked = [0], [-1], Counter()
        first: dict[str, int] = {}
        for i, row in enumerate(rows):
            known = [self.vocabulary.setdefault(word, len(self.vocabulary) + 1) for word in words(row["messages"])]
            ids += [*known, 0]
            owner += [i] * (len(known) + 1)
            if text := prompt(row["messages"]):
                asked[text] += 1
                first.setdefault(text, i)
        for text, i in first.items():
            if not _is_template(asked[text], len(rows), self.boilerplate):
                self.prompts.setdefault(text, (len(self.sets), i))
        self._learn(np.array(ids, np.int64), np.array(owner, np.int64), len(rows))
        self.sets.append(rows)
        return self

    def _learn(self, ids: np.ndarray, owner: np.ndarray, rows: int) -> None:
        """Join the runs of one set, of words `ids` (0 between rows) in row `owner`, to the sorted arrays."""
        usable = ~_any(ids == 0, NGRAM)
        runs, row = _hashes(ids, TEMPLATE), owner[: max(0, len(ids) - TEMPLATE + 1)]
        order = np.lexsort((row, runs))
        once = np.ones(len(runs), bool)  # the first time that a row contains a run
        once[1:] = (np.diff(runs[order]) != 0) | (np.diff(row[order]) != 0)
        values, times = np.unique(runs[order][once], return_counts=True)
        template = np.isin(runs, values[_is_template(times, rows, self.boilerplate)])
        usable &= ~_any(template, NGRAM - TEMPLATE + 1)
        new = _hashes(ids, NGRAM)[usable]
        places = (len(self.sets) << 40) + owner[: len(usable)][usable]
        # Those known before come first, and `unique` keeps the first of equals.
        self.grams, kept = np.unique(np.concatenate([self.grams, new]), return_index=True)
        self.places = np.concatenate([self.places, places])[kept]

    def find(self, conversations: Sequence[Sequence[Message]]) -> list[tuple[str, str] | None]:
        """For each conversation `(rule, the evaluation row that it repeats)`, or None where it is clean."""
        texts = [words(messages) for messages in conversations]
        sizes = np.array([len(text) + 1 for text in texts], np.int64)
        start = np.cumsum(sizes) - sizes
        get = self.vocabulary.get
        ids = np.array([get(word, 0) for text in texts for word in (*text, "")], np.int64)
        where = np.flatnonzero(~_any(ids == 0, NGRAM))
        gram = _hashes(ids, NGRAM)[where]
        at = np.searchsorted(self.grams, gram)
        hit = at < len(self.grams)
        hit[hit] = self.grams[at[hit]] == gram[hit]
        found: list[tuple[str, str] | None] = [self._same_prompt(messages) for messages in conversations]
        for position, place in zip(where[hit], self.places[at[hit]], strict=True):
            i = int(np.searchsorted(start, position, side="right")) - 1
            if found[i] is None:
                run = texts[i][position - start[i] : position - start[i] + NGRAM]
                found[i] = self._shared_words(run, int(place) >> 40, int(place) & ((1 << 40) - 1))
        return found

    def _same_prompt(self, messages: Sequence[Message]) -> tuple[str, str] | None:
        place = self.prompts.get(prompt(messages))
        return place and ("same_prompt", f"the first prompt of {self._name(*place)}")

    def _shared_words(self, run: list[str], number: int, row: int) -> tuple[str, str] | None:
        theirs = words(self.sets[number][row]["messages"])
        if not any(theirs[i : i + NGRAM] == run for i in range(len(theirs) - NGRAM + 1)):
            return None
        return "shared_words", f"{NGRAM} words of {self._name(number, row)}: {' '.join(run)}"

    def _name(self, number: int, row: int) -> str:
        found = self.sets[number][row]
        return f"{found.get('group') or found['source']}/{found['id']}"
