"""Rows kept one after another while they are far enough from all kept before."""

from __future__ import annotations

from typing import Any

import numpy as np

from llmselect.errors import LlmselectError
from llmselect.kernels.cosine import unit

BLOCK = 1024


def check_finite(x: Any, block: int = 8192) -> None:
    """Read `x [n, d]` once. Errors: `LlmselectError` naming rows that are not finite."""
    parts = ((i, np.isfinite(np.asarray(x[i : i + block])).all(1)) for i in range(0, x.shape[0], block))
    bad = np.concatenate([start + np.flatnonzero(~finite) for start, finite in parts])
    if len(bad):
        raise LlmselectError(f"{len(bad)} rows have no finite value and cannot be ranked: rows {bad[:5].tolist()}")


def keep_apart(x: Any, ranked: np.ndarray, k: int, limit: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Go through the rows `ranked` of `x [n, d]` and keep each whose cosine to every row kept before is at most `limit`,
    until `k` are kept.

    Returns kept rows, rejected rows, both in the order of `ranked`, and `[n]` the cosine to the nearest row kept before
    (-1 for the first and for rows not reached). Time O(rows reached · kept · d), memory O(kept · d) in fp32.
    """
    units, count = np.empty((min(k, BLOCK), x.shape[1]), np.float32), 0
    nearest, kept = np.full(x.shape[0], -1.0, np.float32), np.zeros(len(ranked), bool)
    at = 0
    for start in range(0, len(ranked), BLOCK):
        rows = ranked[start : start + BLOCK]
        part = unit(x[rows])
        near = np.full(len(rows), -1.0, np.float32)
        for i in range(0, count, BLOCK):
            near = np.maximum(near, _cosine(part, units[i : min(count, i + BLOCK)]).max(1))
        inside = _cosine(part, part)
        for i in range(len(rows)):
            if count == k:
                break
            at = start + i + 1
            if near[i] <= limit:
                kept[start + i] = True
                near[i + 1 :] = np.maximum(near[i + 1 :], inside[i, i + 1 :])
                if count == len(units):
                    units = np.concatenate([units, np.empty((min(k, 2 * count) - count, x.shape[1]), np.float32)])
                units[count], count = part[i], count + 1
        nearest[ranked[start:at]] = near[: at - start]
        if count == k:
            break
    return ranked[kept], ranked[:at][~kept[:at]], nearest


def _cosine(part: np.ndarray, others: np.ndarray) -> np.ndarray:
    """In fp64 and then rounded: a GEMM rounds a row by where it lies in a tile, and a copy, even one kept in fp32, gives 1."""
    return (part @ others.astype(np.float64).T).astype(np.float32)
