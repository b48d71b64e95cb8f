"""The k best scores in a total order, of one column or of many that come in blocks."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from llmselect.errors import LlmselectError


def topk_stable(scores: np.ndarray, k: int, keys: np.ndarray, *, largest: bool = True) -> np.ndarray:
    """Indices of the `k` best of `scores [n]`, best first; equal scores by ascending `keys [n]`, then by index.

    O(n + k log k). Errors: `LlmselectError` naming rows whose score is NaN or infinite: they have no rank.
    """
    scores = np.asarray(scores)
    finite = np.isfinite(scores)
    if not finite.all():
        bad = np.flatnonzero(~finite)
        raise LlmselectError(f"{len(bad)} rows have no finite score and cannot be ranked: rows {bad[:5].tolist()}")
    k = min(k, len(scores))
    if k <= 0:
        return np.zeros(0, np.int64)
    value = -scores.astype(np.float64) if largest else scores.astype(np.float64)
    if k < len(value):
        limit = np.partition(value, k - 1)[k - 1]
        sure, tied = np.flatnonzero(value < limit), np.flatnonzero(value == limit)
        tied = tied[np.argsort(keys[tied], kind="stable")][: k - len(sure)]
        candidates = np.concatenate([sure, tied])
    else:
        candidates = np.arange(len(value))
    return candidates[np.lexsort((candidates, keys[candidates], value[candidates]))].astype(np.int64)


Best = list[tuple[np.ndarray, np.ndarray]]


def best_per_column(
    blocks: Iterable[tuple[int, np.ndarray]], n: int, columns: int, count: int, keys: np.ndarray
) -> tuple[Best, np.ndarray]:
    """The `count` best rows of each column with their values, best first (ties by key), and each row's largest value `[n]`.

    Args:
        blocks: `(first row, finite fp32 values [b, columns])` over all `n` rows, read once; memory O(columns · count).
    """
    held = [_Held(count, keys) for _ in range(columns)]
    largest, worst = np.empty(n, np.float32), np.full(columns, -np.inf, np.float32)
    for start, block in blocks:
        largest[start : start + len(block)] = block.max(1)
        beats = block >= worst  # most blocks hold few rows that beat what is kept
        for j in np.flatnonzero(beats.any(0)):
            better = np.flatnonzero(beats[:, j])
            worst[j] = held[j].add(start + better, block[better, j])
    return [one.ranked() for one in held], largest


class _Held:
    """What may be among the best of one column: cut to `count` where it is more than twice that, and sorted only at the end."""

    def __init__(self, count: int, keys: np.ndarray):
        self.count, self.keys, self.size, self.worst = count, keys, 0, np.float32(-np.inf)
        self.rows, self.values = list[np.ndarray](), list[np.ndarray]()

    def add(self, rows: np.ndarray, values: np.ndarray) -> np.float32:
        """The value below which no row can be among the best any more."""
        self.rows.append(rows)
        self.values.append(values)
        self.size += len(rows)
        if self.size > 2 * self.count:
            self._cut()
        return self.worst

    def _cut(self) -> None:
        rows, values = np.concatenate(self.rows), np.concatenate(self.values)
        self.worst = np.partition(values, len(values) - self.count)[len(values) - self.count]
        tied = np.flatnonzero(values == self.worst)
        stays = values > self.worst
        stays[tied[np.argsort(self.keys[rows[tied]], kind="stable")][: self.count - int(stays.sum())]] = True
        self.rows, self.values, self.size = [rows[stays]], [values[stays]], self.count

    def ranked(self) -> tuple[np.ndarray, np.ndarray]:
        """The best, best first."""
        rows = np.concatenate([np.zeros(0, np.int64), *self.rows])
        values = np.concatenate([np.zeros(0, np.float32), *self.values])
        order = np.lexsort((self.keys[rows], -values))[: self.count]
        return rows[order], values[order]
