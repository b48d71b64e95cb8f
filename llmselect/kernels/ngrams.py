"""Sums over sparse counts, and how much nearer than the pool a selection is to a target."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from llmselect.array_views import Subset
from llmselect.errors import LlmselectError
from llmselect.kernels.jaccard import sparse_blocks


def totals(x: Any) -> tuple[np.ndarray, np.ndarray]:
    """Sums over rows `[width]` and over columns `[n]` of counts `x [n, width]`, in one reading.

    Errors: `LlmselectError` naming rows with a value that is negative or not finite.
    """
    columns, lengths = np.zeros(x.shape[1]), np.zeros(x.shape[0])
    for start, rows in sparse_blocks(x):
        columns += np.bincount(rows.indices, rows.data, minlength=x.shape[1])
        lengths[start : start + len(rows)] = rows.scipy() @ np.ones(x.shape[1])
    return columns, lengths


def products(x: Any, weights: np.ndarray) -> np.ndarray:
    """`[n]` float64: Σ_b x_ib w_b."""
    out = np.empty(x.shape[0])
    for start, rows in sparse_blocks(x):
        out[start : start + len(rows)] = rows.scipy() @ weights
    return out


def counted(target: Any) -> np.ndarray:
    """`[width]` float64 counts of all target rows together. Errors: `LlmselectError` if they are no counts."""
    held = np.asarray(target.sum(0, dtype=np.float64)).ravel()
    if not np.isfinite(held).all() or (held < 0).any() or not held.any():
        raise LlmselectError("target: its counts are all zero, negative or not finite; it has to be n-gram counts")
    return held


def kl_reduction(x: Any, chosen: np.ndarray, target: Any, prior: float = 2000.0) -> float:
    """KL(target ‖ pool) - KL(target ‖ chosen), in nats: positive if the rows `chosen` are nearer to the target.

    Args:
        x: counts of the pool `[n, width]`, sparse or dense.
        chosen: row numbers, those of any selection.
        target: counts `[m, width]`.
        prior: counts of the pool's distribution (one count added to each bucket) that are added to pool and chosen,
            since a bucket without counts would make the divergence infinite.
    """
    return kl_reductions(x, [chosen], target, prior)[0]


def kl_reductions(x: Any, several: Sequence[np.ndarray], target: Any, prior: float = 2000.0) -> list[float]:
    """`kl_reduction` of several selections from one pool, whose counts are read once."""
    pool, wanted = totals(x)[0], counted(target)
    array = x if hasattr(x, "dtype") and hasattr(x, "ndim") else np.asarray(x)
    smooth = (pool + 1) / (pool.sum() + len(pool))

    def share(counts: np.ndarray) -> np.ndarray:
        return (counts + prior * smooth) / (counts.sum() + prior)

    picked = (totals(Subset(array, np.sort(np.asarray(chosen, np.int64))))[0] for chosen in several)
    return [float(wanted @ np.log(share(one) / share(pool)) / wanted.sum()) for one in picked]
