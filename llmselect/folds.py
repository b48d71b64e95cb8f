"""Cross-fitting: a target in folds, and the rows of a pool that share text with one of them.

Text is shared as `pool.decontaminate` sees it: the same conversation, the same prompt, or 13 words that are not the target's
template (`llmselect.decontaminate`).
"""

from __future__ import annotations

# datasets and scipy have no types.
# pyright: reportMissingTypeStubs=false, reportUnknownVariableType=false
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmselect import atomic, config
from llmselect.decontaminate import Contamination
from llmselect.errors import LlmselectError, UsageError
from llmselect.kernels.keyed import Keyed, keys_of

if TYPE_CHECKING:
    from datasets import Dataset

NAME = "folds.json"


@dataclass(frozen=True)
class Folds:
    """`count` folds; `of` has the fold of every target row, and of every pool row that shares text with the target, by id."""

    count: int
    of: Mapping[str, int]

    def places(self, folder: Path) -> tuple[Path, ...]:
        """The folders of what was trained on all folds but 0, 1, …"""
        return tuple(folder / f"fold-{k}" for k in range(self.count))

    def fingerprint(self) -> str:
        """Identity of the folds and their rows."""
        return config.fingerprint({"count": self.count, "of": dict(self.of)})

    def save(self, folder: Path) -> None:
        """Write `folds.json`, complete or absent."""
        atomic.write_sealed(folder / NAME, {"count": self.count, "of": dict(self.of)})

    @staticmethod
    def load(folder: Path) -> Folds | None:
        """The folds in a folder; None where there are none.

        Errors: `LlmselectError` for a damaged file.
        """
        if not (folder / NAME).exists():
            return None
        about = atomic.read_sealed(folder / NAME, f"delete {folder} and run again")
        return Folds(int(about["count"]), about["of"])


class Sharing:
    """Which rows of a target other rows share text with."""

    def __init__(self, target: Dataset):
        self.ids: list[str] = [*target["id"]]
        self.text: Contamination = Contamination().add(target)
        self._number = {row_id: i for i, row_id in enumerate(self.ids)}

    def rows(self, row_id: str, messages: Any) -> list[int]:
        """The numbers of target rows, one for each prompt and run of words shared; only itself for a target row's copy.

        Of target rows that have a run of words in common, the first stands for all.
        """
        if row_id in self._number:
            return [self._number[row_id]]
        return self._by_text(messages)

    def _by_text(self, messages: Any) -> list[int]:
        return [self._number[name.rpartition("/")[2]] for name, _ in self.text.matches(messages)]

    def parts(self, target: Dataset) -> np.ndarray:
        """`[m]` numbers of the parts of the target between which no text is shared."""
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components

        chats: list[Any] = [*target["messages"]]
        pairs = [(i, j) for i, messages in enumerate(chats) for j in self._by_text(messages)]
        ends = np.array(pairs, np.int64).reshape(-1, 2)
        graph = coo_array((np.ones(len(ends)), (ends[:, 0], ends[:, 1])), shape=(len(self.ids),) * 2)
        return connected_components(graph, directed=False)[1]


def shared_rows(pool: Dataset, sharing: Sharing, batch: int = 1000) -> dict[str, list[int]]:
    """The ids of the pool rows that share text with the target, and with which of its rows."""
    found = dict[str, list[int]]()
    for start in range(0, len(pool), batch):
        part: dict[str, list[Any]] = pool.select_columns(["id", "messages"])[start : start + batch]
        for row_id, messages in zip(part["id"], part["messages"], strict=True):
            if rows := sharing.rows(row_id, messages):
                found[row_id] = rows
    return found


def deal(parts: np.ndarray, ids: list[str], count: int, seed: int) -> np.ndarray:
    """`[m]` folds of target rows: parts (`Sharing.parts`) stay whole and go to the smallest fold, the largest part first and
    the others in an order that the seed and their ids decide.

    Errors: `UsageError` when there are fewer parts than folds.
    """
    if (most := len(np.unique(parts))) < count:
        raise UsageError(f"{count} folds of {len(ids)} rows, of which only {most} parts share no text; give at most {most}")
    draw, fold, size = Keyed(seed, keys_of(ids, len(ids))).uniform("folds"), np.zeros(len(ids), np.int64), [0] * count
    members = sorted((np.flatnonzero(parts == part) for part in np.unique(parts)), key=lambda r: (-len(r), draw[r].min()))
    for rows in members:
        smallest = size.index(min(size))
        fold[rows] = smallest
        size[smallest] += len(rows)
    return fold


def folds_of(ids: list[str], fold: np.ndarray, shared: Mapping[str, Iterable[int]]) -> tuple[Folds, int]:
    """The folds of target rows `ids` and of pool rows (`shared_rows`), and how many of these share text with several folds.

    Those are given the fold that they share most with: every adapter has seen a part of them.
    """
    of, several = dict(zip(ids, fold.tolist(), strict=True)), 0
    for row_id, rows in shared.items():
        votes = Counter(int(fold[row]) for row in rows)
        several += len(votes) > 1
        of[row_id] = min(votes, key=lambda k: (-votes[k], k))
    return Folds(int(fold.max()) + 1, of), several


def check_complete(folder: Path, folds: Folds) -> None:
    """Errors: `LlmselectError` naming a fold whose adapter is missing."""
    for place in folds.places(folder):
        if not (place / "adapter_config.json").exists():
            raise LlmselectError(f"{folder / NAME} tells of {folds.count} folds, {place} holds no adapter; train again")
