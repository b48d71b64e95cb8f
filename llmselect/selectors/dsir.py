"""Rows drawn by the importance of their n-grams: how much likelier the target's distribution makes them than the pool's.

Paper: DSIR of Xie et al., "Data Selection for Language Models via Importance Resampling", arXiv 2302.03169.
Objective: with counts c of hashed n-grams, p of all target rows together and q of the pool:
    log w_i = Σ_b c_ib (log p_b - log q_b); k rows drawn without replacement with probability ∝ w^κ, by Gumbel top-k.
Inputs: `x [n, buckets]` ≥ 0, sparse or dense (the `ngram` feature); `target [m, buckets]`.
Cost: two readings of the non-zeros; memory O(n + buckets). CPU only.
Deviations: on rows of very different lengths the published weight is a length score and exceeds the noise by far. So:
    p_b = (C_b + μ q_b) / (Σ C + μ), the target's counts C backed off to the pool; log w is a mean over the row's
    n-grams; κ makes the effective number of rows, (Σ w^κ)² / Σ w^2κ, equal to 2k (above a third of the pool midway
    between k and all rows), so that a selection is not nested. `parity` gives the published form: p = C / Σ C, sums,
    1e-8 added to p and q before the log, rows below 100 words left out, κ = 1. Rows left out, and rows without
    n-grams, come last where the budget reaches them.
Defaults: μ = 2000, a customary Dirichlet prior; κ solved.
Use: target examples, no GPU, or a pool too large for one pass of a model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from llmselect.errors import LlmselectError, UsageError
from llmselect.kernels.gumbel import gumbel_topk, kappa_of
from llmselect.kernels.keyed import Keyed
from llmselect.kernels.ngrams import counted, products, totals
from llmselect.registry import selectors
from llmselect.selectors._base import Picked, Selector

PUBLISHED_WORDS, PUBLISHED_EPSILON = 100, 1e-8


@selectors.register("dsir")
@dataclass(frozen=True)
class Dsir(Selector):
    """Rows by importance resampling; scores are log w. Evidence: the row's `log_weight` and its number of `ngrams`."""

    nested: ClassVar[bool] = False
    stochastic: ClassVar[bool] = True
    sparse: ClassVar[bool] = True
    x_sign: ClassVar[str] = "nonnegative"

    parity: bool = field(default=False, metadata={"help": "the published form, see Deviations"})
    prior: float = field(default=2000.0, metadata={"help": "μ: counts of the pool's distribution added to the target's"})
    kappa: float | None = field(default=None, metadata={"help": "exponent of the weights; null: solved"})

    def __post_init__(self) -> None:
        if not self.prior > 0:
            raise UsageError(f"prior: {self.prior} must be above 0")
        if self.kappa is not None and not 0 <= self.kappa < float("inf"):
            raise UsageError(f"kappa: {self.kappa} must be 0 or more")

    def pick(self, k: int, rng: Keyed, *, x: Any, target: Any) -> Picked:
        pool, ngrams = totals(x)
        if not pool.any():
            raise LlmselectError("x: no row of the pool has an n-gram")
        log_weights = products(x, self._log_ratio(pool / pool.sum(), counted(target)))
        # A row of L words has 2L - 1 n-grams of one or two words.
        enough = np.ceil(ngrams / 2) >= (PUBLISHED_WORDS if self.parity else 1)
        if not self.parity:
            log_weights /= np.where(ngrams > 0, ngrams, 1)
        parts = [np.flatnonzero(enough), np.flatnonzero(~enough)]
        kappa = self._kappa(log_weights[parts[0]], k)
        order = [part[gumbel_topk(log_weights[part], k, Keyed(rng.seed, rng.keys[part]), kappa)] for part in parts]
        order = np.concatenate(order)[:k]
        return Picked(order, log_weights, evidence={"log_weight": log_weights[order], "ngrams": ngrams[order]})

    def _log_ratio(self, pool: np.ndarray, target: np.ndarray) -> np.ndarray:
        if self.parity:
            return np.log(target / target.sum() + PUBLISHED_EPSILON) - np.log(pool + PUBLISHED_EPSILON)
        backed_off = (target + self.prior * pool) / (target.sum() + self.prior)
        seen = pool > 0  # other buckets have no row to weigh
        return np.log(np.where(seen, backed_off, 1) / np.where(seen, pool, 1))

    def _kappa(self, log_weights: np.ndarray, k: int) -> float:
        if self.kappa is not None or self.parity:
            return 1.0 if self.kappa is None else self.kappa
        return kappa_of(log_weights, min(2 * k, (len(log_weights) + k) / 2))
