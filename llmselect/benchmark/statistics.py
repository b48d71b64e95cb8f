"""Paired bootstrap over seeds and held-out rows, Holm's adjustment, rank correlation with an interval."""

from __future__ import annotations

# scipy has no types.
# pyright: reportMissingTypeStubs=false
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

DRAWS = 10_000


@dataclass(frozen=True)
class Difference:
    """A mean difference with its 95 % interval and two-sided p, both from the bootstrap."""

    mean: float
    low: float
    high: float
    p: float


def paired(targets: Mapping[str, Mapping[str, np.ndarray]], draws: int = DRAWS) -> Difference:
    """Mean over targets of the mean over tasks of the mean over seeds and rows of differences.

    A draw takes seeds with replacement, the same for all targets, and rows with replacement within their task, the same
    for all seeds and for everything compared on that task.

    Args:
        targets: target → task → `[seeds, rows]` differences of two arms that share seed and row.
    """
    uniform = _seed_draws(draws, max(len(one) for tasks in targets.values() for one in tasks.values()))
    total, mean = np.zeros(draws), 0.0
    for target, tasks in targets.items():
        for task, values in tasks.items():
            values = np.asarray(values, np.float64)
            seeds, rows = values.shape
            weight = 1.0 / (len(tasks) * len(targets))
            by_row = values @ _row_counts(f"{target}/{task}", rows, draws) / rows
            picked = np.minimum((uniform[:, :seeds] * seeds).astype(np.int64), seeds - 1)
            total += weight * by_row[picked, np.arange(draws)[:, None]].mean(1)
            mean += weight * float(values.mean())
    low, high = np.quantile(total, [0.025, 0.975])
    tail = min((total <= 0).sum(), (total >= 0).sum())
    return Difference(mean, float(low), float(high), min(1.0, 2 * (float(tail) + 1) / (draws + 1)))


@lru_cache(maxsize=4)
def _seed_draws(draws: int, seeds: int) -> np.ndarray:
    """`[draws, seeds]` uniforms; times the number of seeds of a target they are its seeds."""
    return np.random.default_rng(0).random((draws, seeds))


def drawn_rows(name: str, rows: int, draws: int) -> np.ndarray:
    """`[draws, rows]` row numbers drawn with replacement; the same for one name, whatever is compared."""
    seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")
    return np.random.default_rng(seed).integers(0, rows, (draws, rows))


@lru_cache(maxsize=16)
def _row_counts(name: str, rows: int, draws: int) -> np.ndarray:
    """`[rows, draws]`: how often a row is in a draw."""
    flat = drawn_rows(name, rows, draws) + rows * np.arange(draws)[:, None]
    counts = np.bincount(flat.ravel(), minlength=rows * draws).reshape(draws, rows)
    return np.ascontiguousarray(counts.T, np.float64)


def holm(values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment of p values: p_(i) · (m - i + 1), made monotone, at most 1."""
    order, out, highest = np.argsort(values, kind="stable"), [0.0] * len(values), 0.0
    for i, at in enumerate(map(int, order)):
        highest = max(highest, min(1.0, values[at] * (len(values) - i)))
        out[at] = highest
    return out


def spearman_interval(a: np.ndarray, b: np.ndarray, draws: int = 2000) -> tuple[float, float, float]:
    """Spearman's correlation of paired values and its 95 % percentile-bootstrap interval; NaN where one side is constant."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    rows = np.random.default_rng(0).integers(0, len(a), (draws, len(a)))
    found = _correlations(a[rows], b[rows])
    low, high = np.quantile(found[np.isfinite(found)], [0.025, 0.975]) if np.isfinite(found).any() else (np.nan, np.nan)
    return float(_correlations(a[None], b[None])[0]), float(low), float(high)


def _correlations(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """`[draws]` rank correlations of the rows of two `[draws, n]` arrays."""
    import scipy.stats

    stats: Any = scipy.stats
    a, b = (stats.rankdata(one, axis=1) for one in (a, b))
    a, b = (one - one.mean(1, keepdims=True) for one in (a, b))
    size = np.sqrt((a**2).sum(1) * (b**2).sum(1))
    return np.divide((a * b).sum(1), size, out=np.full(len(a), np.nan), where=size > 0)
