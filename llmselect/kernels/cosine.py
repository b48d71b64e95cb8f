"""Cosine similarity of a pool to targets, in blocks of pool rows: `[n, m]` is never built."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from llmselect.errors import LlmselectError

BLOCK = 8192


def unit(rows: Any) -> np.ndarray:
    """Rows of `[b, d]` as fp64 unit vectors; a zero row stays zero, a non-finite one is not finite.

    Where squares would over- or underflow, rows are divided by their largest entry first.
    """
    rows = np.asarray(rows, np.float64)
    square = np.einsum("ij,ij->i", rows, rows)[:, None]
    if not ((square > 1e-200) & (square < 1e200)).all():
        largest = np.abs(rows).max(1, keepdims=True, initial=0)
        with np.errstate(invalid="ignore"):
            rows = rows / np.where(largest > 0, largest, 1)
        square = np.einsum("ij,ij->i", rows, rows)[:, None]
    return rows / np.sqrt(np.where(square > 0, square, 1))


def unit_targets(target: Any) -> np.ndarray:
    """Unit target vectors `[m, d]`; a target without direction is an error, not a similarity of 0."""
    target = np.asarray(target[:], np.float64)
    bad = np.flatnonzero(~np.isfinite(target).all(1) | (np.abs(target).max(1, initial=0) == 0))
    if len(bad):
        raise LlmselectError(f"target rows {bad[:5].tolist()} are zero or not finite: they have no direction to compare with")
    return unit(target)


def similarity_blocks(x: Any, targets: np.ndarray, block: int | None = None) -> Iterator[tuple[int, np.ndarray]]:
    """Yield `(start, cosine [b, m])` over the rows of array-like `x [n, d]`, for unit `targets [m, d]`.

    Errors: `LlmselectError` naming pool rows that are not finite.
    """
    block = block or max(256, min(BLOCK, (1 << 20) // max(1, targets.shape[1])))  # 8 MB: what a cache may hold
    for start in range(0, x.shape[0], block):
        part = x[start : start + block]
        part = part if getattr(x, "unit_rows", False) else unit(part)
        # In fp64 and then rounded: a GEMM rounds a row by where it lies in a tile, and equal rows must tie.
        cosine = (part @ targets.T).astype(np.float32)
        if not np.isfinite(cosine).all():
            bad = start + np.flatnonzero(~np.isfinite(part).all(1))
            raise LlmselectError(f"{len(bad)} rows have no finite value and cannot be ranked: rows {bad[:5].tolist()}")
        yield start, cosine


Best = list[tuple[np.ndarray, np.ndarray]]


def best_per_target(x: Any, targets: np.ndarray, count: int, keys: np.ndarray) -> tuple[Best, np.ndarray]:
    """The `count` nearest pool rows of each target with their cosines, best first (ties by key), and each row's largest
    cosine `[n]`.

    One pass over `x`; memory O(m · count + block · m).
    """
    held = [(np.zeros(0, np.int64), np.zeros(0, np.float32)) for _ in targets]
    largest, worst = np.empty(x.shape[0], np.float32), np.full(len(targets), -np.inf, np.float32)
    for start, cosine in similarity_blocks(x, targets):
        largest[start : start + len(cosine)] = cosine.max(1)
        beats = cosine >= worst  # most blocks hold few rows that beat what is kept
        for j in np.flatnonzero(beats.any(0)):
            rows, values = held[j]
            better = np.flatnonzero(beats[:, j])
            rows = np.concatenate([rows, start + better])
            values = np.concatenate([values, cosine[better, j]])
            if len(values) > 2 * count:  # the sort is only of what may stay
                limit = np.partition(values, len(values) - count)[len(values) - count]
                rows, values = rows[values >= limit], values[values >= limit]
            order = np.lexsort((keys[rows], -values))[:count]
            held[j] = rows[order], values[order]
            if len(order) == count:
                worst[j] = held[j][1][-1]
    return held, largest
