"""Clusters of gradients, each covered by the score that tells most about it.

Paper: Adapt-∞ of Maharana et al., "Scalable Continual Multimodal Instruction Tuning via Dynamic Data Selection", arXiv
    2410.10636, section 3.
Objective: k-means on gradients; in each cluster the score whose histogram, over the pool's standard deviations, has the largest
    entropy is the expert; coverage-centric selection by it inside (`ccs`); waterfill over the clusters.
Inputs: `x [n, d]`, the `gradient` feature; `quality [n, S]`, S scores, in a recipe a list of features (or `[n]`: one for all).
Cost: k-means; O(n·S + n log n).
Deviations: text scores (loss, EL2N, IFD, gradient norm) instead of image grounding. Histograms have bins of equal width from -3
    to 3 standard deviations, what lies outside in the outer ones. The order is nested: rounds over the clusters. Permanent
    pruning is `dedup:`, and what a later run remembers is `pool.memory`: the paper's pool grows with every data set and is cut
    back to a size by pruning in each cluster; here the rows that an earlier run selected join the new pool, duplicates fall
    over both (the old row stays), and clusters and budget are those of both.
Defaults: a cluster per 200 rows, 2 to 100; 50 bins, β = 0.1, large scores are the hard ones.
Use: no target, gradients and several scores at hand, none of which is known to suit the whole pool.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np

from llmselect.errors import UsageError
from llmselect.kernels.groups import rounds
from llmselect.kernels.keyed import Keyed
from llmselect.kernels.kmeans import kmeans
from llmselect.kernels.rows import Rows
from llmselect.kernels.strata import Strata, covering
from llmselect.kernels.topk import topk_stable
from llmselect.registry import selectors
from llmselect.selectors._base import Picked, Selector

WIDEST = 3.0  # standard deviations


@selectors.register("adapt_inf")
@dataclass(frozen=True)
class AdaptInf(Selector):
    """Random rows with equal shares of clusters and, inside, of the strata of the cluster's expert score. Evidence: the row's
    `cluster`, `expert` (the column of quality), `score` by it and `stratum`. The report has the entropies."""

    stochastic: ClassVar[bool] = True
    quality_ndim: ClassVar[tuple[int, ...]] = (1, 2)

    clusters: int | None = field(default=None, metadata={"help": "of gradients; null: one per 200 rows, 2 to 100"})
    bins: int = field(default=50, metadata={"help": "of histograms, and strata"})
    beta: float = field(default=0.1, metadata={"help": "share of a cluster, its hardest rows, that is dropped"})
    strata: Strata = field(default="range", metadata={"help": "as in `ccs`"})
    hard: Literal["largest", "smallest"] = field(default="largest", metadata={"help": "which scores are the hard ones"})

    def __post_init__(self) -> None:
        if self.bins < 1 or (self.clusters is not None and self.clusters < 1):
            raise UsageError(f"bins: {self.bins} and clusters: {self.clusters} must be at least 1")
        if not 0 <= self.beta < 1:
            raise UsageError(f"beta: {self.beta} must be at least 0 and below 1")

    def pick(self, k: int, rng: Keyed, *, x: Any, quality: Any) -> Picked:
        scores = np.asarray(quality, np.float64).reshape(x.shape[0], -1)
        topk_stable(scores.sum(1), 0, rng.keys)  # a row without finite scores is named
        rows = Rows(x)
        made = kmeans(rows, self.clusters or min(len(rows), max(2, min(100, len(rows) // 200))), rng)
        entropy = self._entropies(scores, made.label, len(made.sizes))
        expert = entropy.argmax(1)
        mine = scores[np.arange(len(scores)), expert[made.label]]
        draw, place = rng.uniform("row"), rng.uniform("round")
        turn, stratum = np.empty(len(scores), np.int64), np.empty(len(scores), np.int64)
        for cluster in np.flatnonzero(made.sizes):
            own = np.flatnonzero(made.label == cluster)
            order, stratum[own] = covering(mine[own], self.beta, self.bins, self.strata, draw[own], place[own], rng.keys[own],
                                           self.hard == "largest")  # fmt: skip
            turn[own[order]] = np.arange(len(own))
        found = rounds(made.label, turn, place, rng.keys)[:k]
        evidence = {"cluster": made.label[found], "expert": expert[made.label[found]], "score": mine[found],
                    "stratum": stratum[found]}  # fmt: skip
        report = {"entropy": np.round(entropy, 6).tolist(), "sizes": made.sizes.tolist()}
        return Picked(found, evidence=evidence, report=report)

    def _entropies(self, scores: np.ndarray, label: np.ndarray, clusters: int) -> np.ndarray:
        """`[clusters, S]` in nats; in float32, so that rounding decides no tie: those go to the first column."""
        spread = scores.std(0)
        standard = (scores - scores.mean(0)) / np.where(spread > 0, spread, 1)
        cell = ((np.clip(standard, -WIDEST, WIDEST) + WIDEST) / (2 * WIDEST) * self.bins + 1e-9).astype(np.int64)
        cell = np.minimum(cell, self.bins - 1)
        out = np.empty((clusters, scores.shape[1]), np.float32)
        for column in range(scores.shape[1]):
            count = np.bincount(label * self.bins + cell[:, column], minlength=clusters * self.bins)
            share = count.reshape(clusters, -1) / np.maximum(1, np.bincount(label, minlength=clusters))[:, None]
            out[:, column] = -(share * np.log(np.where(share > 0, share, 1))).sum(1)
        return out
