"""Cosine similarity of a pool to targets, in blocks of pool rows: `[n, m]` is never built."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from llmselect.errors import LlmselectError
from llmselect.kernels.topk import Best, best_per_column

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


def best_per_target(x: Any, targets: np.ndarray, count: int, keys: np.ndarray) -> tuple[Best, np.ndarray]:
    """The `count` nearest pool rows of each target with their cosines, best first (ties by key), and each row's largest
    cosine `[n]`.

    One pass over `x`; memory O(m · count + block · m).
    """
    return best_per_column(similarity_blocks(x, targets), x.shape[0], len(targets), count, keys)
