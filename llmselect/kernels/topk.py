"""The k best scores in a total order."""

from __future__ import annotations

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
