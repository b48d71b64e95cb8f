"""Weighted sampling without replacement by Gumbel noise, and the exponent that gives weights a wanted spread."""

from __future__ import annotations

import numpy as np

from llmselect.kernels.keyed import Keyed
from llmselect.kernels.topk import topk_stable


def gumbel_topk(log_weights: np.ndarray, k: int, rng: Keyed, kappa: float = 1.0) -> np.ndarray:
    """The `k` rows with the largest κ·log w - log(-log U), U uniform per row: `k` draws without replacement, each with
    probability proportional to w^κ among the rows not yet drawn, in the order drawn.

    The noise depends on (seed, row id) alone. Errors: `LlmselectError` naming rows whose weight is not finite.
    """
    return topk_stable(kappa * np.asarray(log_weights, np.float64) - np.log(-np.log(rng.uniform("gumbel"))), k, rng.keys)


def effective_size(log_weights: np.ndarray, kappa: float) -> float:
    """(Σ w^κ)² / Σ w^2κ: of how many rows of equal weight the weights are worth."""
    w = np.exp(kappa * (log_weights - log_weights.max()))
    return float(w.sum() ** 2 / (w * w).sum())


def kappa_of(log_weights: np.ndarray, size: float) -> float:
    """The κ ≥ 0 at which the effective size is `size`, to 9 digits; 0 if all weights are equal or `size` is all rows.

    The effective size falls as κ grows, from all rows to those that tie for the largest weight; a smaller `size` than
    that gives a κ at which no others count.
    """
    spread = float(np.ptp(log_weights)) if len(log_weights) else 0.0
    if spread == 0 or size >= len(log_weights):
        return 0.0
    low, high = 0.0, 1 / spread
    for _ in range(60):
        if effective_size(log_weights, high) <= size:
            break
        low, high = high, 2 * high
    for _ in range(34):
        middle = (low + high) / 2
        low, high = (middle, high) if effective_size(log_weights, middle) > size else (low, middle)
    return high
