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
    held = [(np.zeros(0, np.int64), np.zeros(0, np.float32)) for _ in range(columns)]
    largest, worst = np.empty(n, np.float32), np.full(columns, -np.inf, np.float32)
    for start, block in blocks:
        largest[start : start + len(block)] = block.max(1)
        beats = block >= worst  # most blocks hold few rows that beat what is kept
        for j in np.flatnonzero(beats.any(0)):
            rows, values = held[j]
            better = np.flatnonzero(beats[:, j])
            rows = np.concatenate([rows, start + better])
            values = np.concatenate([values, block[better, j]])
            if len(values) > 2 * count:  # the sort is only of what may stay
                limit = np.partition(values, len(values) - count)[len(values) - count]
                rows, values = rows[values >= limit], values[values >= limit]
            order = np.lexsort((keys[rows], -values))[:count]
            held[j] = rows[order], values[order]
            if len(order) == count:
                worst[j] = held[j][1][-1]
    return held, largest
