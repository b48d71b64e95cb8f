"""k-means on a line, where every cluster is an interval of the sorted values."""

from __future__ import annotations

import numpy as np


def intervals(values: np.ndarray, k: int, *, iterations: int = 100) -> np.ndarray:
    """Labels `[n]` of Lloyd's k-means of `values [n]` (finite), 0 for the interval of the smallest ones.

    Starts from the distinct values at the quantiles (j + ½)/k and stops when no label changes, so there is nothing
    random and the order of the values does not matter. A value half-way between two centroids goes to the lower one.
    There are fewer than `k` labels where there are fewer distinct starts, or where a cluster loses all its values;
    labels have no gaps. O(n log n), then O(k log n) per iteration.
    """
    ordered = np.sort(np.asarray(values, np.float64))
    if not len(ordered):
        return np.zeros(0, np.int64)
    centroids = np.unique(ordered[((np.arange(k) + 0.5) / k * len(ordered)).astype(np.int64)])
    total = np.r_[0.0, np.cumsum(ordered)]
    edges = np.zeros(0, np.int64)
    for _ in range(iterations):
        cuts = np.searchsorted(ordered, (centroids[1:] + centroids[:-1]) / 2, side="right")
        found = np.unique(np.r_[0, cuts, len(ordered)])  # an interval that lost all its values is dropped
        if np.array_equal(found, edges):
            break
        edges = found
        centroids = np.diff(total[edges]) / np.diff(edges)
    return np.searchsorted(ordered[edges[1:-1] - 1], np.asarray(values, np.float64), side="left")
