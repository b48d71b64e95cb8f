"""Weights over clusters that follow scores, and rows drawn from clusters in several rounds without taking any twice."""

from __future__ import annotations

from typing import Literal

import numpy as np

from llmselect.errors import LlmselectError

Update = Literal["exp", "paper", "softmax"]


def cluster_means(cluster: np.ndarray, scores: np.ndarray, k: int) -> np.ndarray:
    """Mean score of each of `k` clusters `[k]`, over the rows of `cluster [m]` whose `scores [m]` are not NaN; NaN where
    there is none.

    Errors: `LlmselectError` naming an infinite score.
    """
    scores = np.asarray(scores, np.float64)
    if np.isinf(scores).any():
        raise LlmselectError(f"the score of answer {int(np.flatnonzero(np.isinf(scores))[0])} is infinite; give numbers, or NaN")
    held = ~np.isnan(scores)
    total = np.bincount(cluster[held], scores[held], k)
    count = np.bincount(cluster[held], minlength=k)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def reweighted(weights: np.ndarray, means: np.ndarray, update: Update, temperature: float = 1.0) -> np.ndarray:
    """New weights `[k]` of clusters, summing to 1, from the old ones and the clusters' mean scores `[k]`.

    With z = (s − mean s) / sd s over the clusters that have a score (z = 0 when they are all equal):

    - `exp`: w ∝ w_prev · exp(z / temperature);
    - `softmax`: w ∝ exp(z / temperature), which forgets w_prev;
    - `paper`: w ∝ w_prev · max(s, 0) (arXiv 2409.11378, section 4, clipped because s may be negative); a cluster that
      reaches 0 stays there, and when no score is positive the weights stay as they are.

    A cluster without a score (NaN) keeps its weight: the others share what they had together.
    """
    weights = np.asarray(weights, np.float64)
    scored = ~np.isnan(means)
    if not scored.any():
        return weights.copy()
    s, old = np.asarray(means, np.float64)[scored], weights[scored]
    if update == "paper":
        new = old * np.maximum(s, 0)
    else:
        spread = s.std()
        # Equal scores differ by rounding alone, and dividing by that would make something of nothing.
        z = (s - s.mean()) / spread if spread > 1e-12 * max(1.0, float(np.abs(s).max())) else np.zeros(len(s))
        # exp(z − max z): the same after renormalising, and it cannot overflow.
        new = np.exp((z - z.max()) / temperature) * (old if update == "exp" else 1)
    out = weights.copy()
    if new.sum() > 0:
        out[scored] = new / new.sum() * old.sum()
    return out / out.sum()


def in_cluster_order(label: np.ndarray, value: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """All rows `[n]` sorted by cluster, in a cluster by `value` (largest first), equal values by `keys`.

    With value = log p + Gumbel noise, taking a cluster's next rows from this order again and again is sampling without
    replacement with probability ∝ p, however it is divided into rounds.
    """
    return np.lexsort((keys, -value, label))


def next_rows(order: np.ndarray, label: np.ndarray, taken: np.ndarray, share: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """The next `share [k]` rows of every cluster of `order` (see `in_cluster_order`) after the `taken [k]` first ones.

    Clusters are interleaved, so that any prefix is spread over them.
    """
    sizes = np.bincount(label, minlength=len(share))
    start = np.cumsum(sizes) - sizes
    home = label[order]
    place = np.arange(len(order)) - start[home] - taken[home]
    held = (place >= 0) & (place < share[home])
    rows, turn = order[held], (place[held] + 0.5) / share[home[held]]
    return rows[np.lexsort((keys[rows], turn))]
