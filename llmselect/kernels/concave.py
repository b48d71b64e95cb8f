"""Lazy greedy maximisation of Σ_l φ(Σ_{i∈S} x_il), φ(z) = (z + ε)^a, by its linearised gain, on sparse rows.

Import it where it is used: numba, which it needs at once, takes a second to import.
"""

from __future__ import annotations

import heapq
from typing import Any

import numpy as np
from numba import njit

from llmselect.arrays import Csr

EPSILON = 1e-6


@njit(nogil=True, cache=True)
def _sum(of: Any, i: int, per_column: np.ndarray) -> float:  # pragma: no cover - compiled
    """Σ_j of_ij · per_column_j."""
    indptr, indices, data = of
    total = 0.0
    for e in range(indptr[i], indptr[i + 1]):
        total += data[e] * per_column[indices[e]]
    return total


@njit(nogil=True, cache=True)
def _take(rows, spread, back, i, power, mass, slope, worth):  # pragma: no cover - compiled
    """Add row i: its mass to Z, then φ'(Z) where Z changed, then P φ'(Z) where that changed."""
    (indptr, indices, data), (out_ptr, out_to, out_share), (in_ptr, in_from) = rows, spread, back
    for e in range(indptr[i], indptr[i + 1]):
        for f in range(out_ptr[indices[e]], out_ptr[indices[e] + 1]):
            mass[out_to[f]] += data[e] * out_share[f]
    for e in range(indptr[i], indptr[i + 1]):
        for f in range(out_ptr[indices[e]], out_ptr[indices[e] + 1]):
            slope[out_to[f]] = power * (mass[out_to[f]] + EPSILON) ** (power - 1)
    for e in range(indptr[i], indptr[i + 1]):
        for f in range(out_ptr[indices[e]], out_ptr[indices[e] + 1]):
            for g in range(in_ptr[out_to[f]], in_ptr[out_to[f] + 1]):
                worth[in_from[g]] = _sum(spread, in_from[g], slope)


@njit(nogil=True, cache=True)
def _run(rows, spread, back, keys, power, order, gains):  # pragma: no cover - compiled
    width = len(spread[0]) - 1
    mass, slope, worth = np.zeros(width), np.full(width, power * EPSILON ** (power - 1)), np.empty(width)
    for j in range(width):
        worth[j] = _sum(spread, j, slope)
    heap = [(-_sum(rows, i, worth), keys[i], i) for i in range(len(keys))]
    heapq.heapify(heap)
    evaluated = 0
    for step in range(len(order)):
        for _ in range(len(heap) + 1):  # gains only fall, so one that stays on top when it is computed anew is the largest
            i = heap[0][2]
            gain = _sum(rows, i, worth)
            evaluated += 1
            heapq.heapreplace(heap, (-gain, keys[i], i))
            if heap[0][2] == i:
                break
        bound, _, i = heapq.heappop(heap)
        order[step], gains[step] = i, -bound
        _take(rows, spread, back, i, power, mass, slope, worth)
    return evaluated


def concave_greedy(rows: Csr, spread: Any, k: int, keys: np.ndarray, power: float) -> tuple[np.ndarray, np.ndarray, int]:
    """Greedy order of `k` rows: each has the largest Σ_l φ'(Z_l) x_il of those left, Z = Σ x over rows taken; ties by key.

    Args:
        rows: v ≥ 0, `[n, width]`; x = v P.
        spread: P ≥ 0 `[width, width]`, `scipy.sparse`.
        power: a in (0, 1].

    Returns rows, their gains when taken, and how many gains were computed after the first n. The order is that of
    computing all gains at every step. Memory: `rows` and O(n).
    """
    spread = spread.tocsr()
    spread.sort_indices()
    back = spread.tocsc()
    order, gains = np.empty(k, np.int64), np.empty(k)
    evaluated = _run(
        (np.asarray(rows.indptr, np.int64), np.asarray(rows.indices, np.int32), np.asarray(rows.data, np.float64)),
        (spread.indptr.astype(np.int64), spread.indices.astype(np.int32), spread.data.astype(np.float64)),
        (back.indptr.astype(np.int64), back.indices.astype(np.int32)),
        keys.astype(np.uint64),
        float(power),
        order,
        gains,
    )
    return order, gains, int(evaluated)
