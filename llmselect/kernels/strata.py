"""Strata of a score, and the order of coverage-centric selection over them."""

from __future__ import annotations

from typing import Literal

import numpy as np

from llmselect.kernels.groups import rounds
from llmselect.kernels.topk import topk_stable

Strata = Literal["range", "quantile", "log"]


def strata(score: np.ndarray, bins: int, how: Strata, keys: np.ndarray) -> np.ndarray:
    """The stratum of each row, 0 … bins - 1: of equal width, of equal count, or of equal width of
    log(1 + (x - min) / median(x - min)), the median over rows above the minimum."""
    if how == "quantile":
        out = np.empty(len(score), np.int64)
        out[np.lexsort((keys, score))] = np.arange(len(score)) * bins // max(1, len(score))
        return out
    above = score - score.min(initial=np.inf)
    if how == "log":
        above = np.log1p(above / np.median(above[above > 0])) if above.any() else above
    width = above.max(initial=0) / bins or 1.0
    return np.minimum((above / width).astype(np.int64), bins - 1)


def covering(score: np.ndarray, beta: float, bins: int, how: Strata, draw: np.ndarray, place: np.ndarray, keys: np.ndarray,
             largest: bool = True) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """All rows in the order of coverage-centric selection, and the stratum of each (-1: among the hardest, which come last,
    the easiest of them first).

    Args:
        beta: share of the rows, the hardest, that is dropped.
        draw: `[n]`, the turn of a row in its stratum; place: `[n]`, its place in a round.
        largest: whether the largest scores are the hardest.
    """
    hardest = topk_stable(score, int(beta * len(score) + 1e-9), keys, largest=largest)
    kept = np.delete(np.arange(len(score)), hardest)
    stratum = np.full(len(score), -1)
    stratum[kept] = strata(score[kept], bins, how, keys[kept])
    order = kept[rounds(stratum[kept], draw[kept], place[kept], keys[kept])]
    return np.concatenate([order, hardest[::-1]]), stratum
