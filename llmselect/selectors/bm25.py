"""Rows that a search for the target rows finds: Okapi BM25 on n-gram counts.

Paper: Robertson and Zaragoza, "The Probabilistic Relevance Framework: BM25 and Beyond", FnTIR 3(4), 2009, section 3; the
    baseline of Xia et al., "LESS", arXiv 2402.04333.
Objective: s_ij = Σ_b t_jb · idf_b · c_ib (k₁ + 1) / (c_ib + k₁ (1 - b + b |c_i| / mean |c|)) of row counts c_i and target
    counts t_j, idf_b = ln(1 + (n - n_b + ½) / (n_b + ½)), n_b the rows that hold bucket b. `round_robin`: every target
    row is a query and gives its best row not yet taken, turns going from group to group; `mean` or `max` of s_ij over
    the target rows of a group, groups taking turns.
Inputs: `x [n, buckets]` ≥ 0, sparse or dense (the `ngram` feature); `target [m, buckets]`; optional `target_groups [m]`.
Cost: two readings of the non-zeros, O(m) each in the second (O(G) for `mean`); memory O(m · buckets), and O(k) candidates
    or O(n · G).
Deviations: terms are hashed n-grams, so that colliding ones count as one; the idf has the 1 inside that keeps it
    positive.
Defaults: k₁ = 1.2, b = 0.75; round robin, because scores of different queries are not comparable.
Use: target examples that share words with the rows looked for; no model, no GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np

from llmselect.errors import LlmselectError, UsageError
from llmselect.kernels.groups import round_robin
from llmselect.kernels.jaccard import sparse_blocks
from llmselect.kernels.keyed import Keyed
from llmselect.kernels.topk import Best, best_per_column, topk_stable
from llmselect.kernels.turns import queries_in_turn
from llmselect.registry import selectors
from llmselect.selectors._base import Picked, Selector


@selectors.register("bm25")
@dataclass(frozen=True)
class Bm25(Selector):
    """Rows by BM25 to the target rows. Evidence: the `query` (target row) or `group` that picked the row."""

    sparse: ClassVar[bool] = True
    x_sign: ClassVar[str] = "nonnegative"

    combine: Literal["round_robin", "mean", "max"] = field(default="round_robin", metadata={"help": "over target rows"})
    k1: float = field(default=1.2, metadata={"help": "how late repeated terms stop to count; 0: at once"})
    b: float = field(default=0.75, metadata={"help": "how far counts are divided by the row's length: 0 not, 1 wholly"})

    def __post_init__(self) -> None:
        if not 0 <= self.k1 < float("inf") or not 0 <= self.b <= 1:
            raise UsageError(f"k1: {self.k1} must be 0 or more, and b: {self.b} from 0 to 1")

    def pick(self, k: int, rng: Keyed, *, x: Any, target: Any, target_groups: Any = None) -> Picked:
        counts, n = np.asarray(target, np.float64), x.shape[0]
        if len(bad := np.flatnonzero(~(np.isfinite(counts) & (counts >= 0)).all(1) | ~counts.any(1))):
            raise LlmselectError(f"target rows {bad[:5].tolist()} have no n-grams, or counts that are negative or not finite")
        named = np.zeros(len(counts)) if target_groups is None else np.asarray(target_groups)
        groups, group = np.unique(named, return_inverse=True)
        idf, average = self._statistics(x)
        queries = counts * idf
        if self.combine == "round_robin":

            def best(count: int) -> tuple[Best, np.ndarray]:
                return best_per_column(self._blocks(x, queries, average), n, len(queries), count, rng.keys)

            order, query, largest = queries_in_turn(best, group, k, n)
            return Picked(order, largest, evidence={"query": query})
        means = np.stack([queries[group == g].mean(0) for g in range(len(groups))])
        scores = np.empty((n, len(groups)), np.float32)
        for start, block in self._blocks(x, means if self.combine == "mean" else queries, average):
            if self.combine == "max":
                block = np.stack([block[:, group == g].max(1) for g in range(len(groups))], axis=1)
            scores[start : start + len(block)] = block
        order, by = round_robin([topk_stable(column, k, rng.keys) for column in scores.T], k, n)
        return Picked(order, scores if len(groups) > 1 else scores[:, 0], evidence={"group": groups[by]})

    def _statistics(self, x: Any) -> tuple[np.ndarray, float]:
        """idf `[buckets]` and the mean length of a row."""
        holding, length = np.zeros(x.shape[1]), 0.0
        for _, rows in sparse_blocks(x):
            holding += np.bincount(rows.indices[rows.data > 0], minlength=x.shape[1])
            length += float(rows.data.sum(dtype=np.float64))
        return np.log1p((x.shape[0] - holding + 0.5) / (holding + 0.5)), length / x.shape[0]

    def _blocks(self, x: Any, queries: np.ndarray, average: float) -> Iterator[tuple[int, np.ndarray]]:
        """`(first row, scores [b, len(queries)])`."""
        for start, rows in sparse_blocks(x):
            terms = rows.scipy().astype(np.float64)
            length = np.repeat(terms.sum(1), np.diff(terms.indptr))
            share = 1 - self.b + self.b * length / (average or 1)
            terms.data *= (self.k1 + 1) / np.maximum(terms.data + self.k1 * share, 1e-300)  # a stored zero stays zero
            # Rounded, or equal scores whose sums ran in another order would not tie.
            yield start, np.asarray(terms @ queries.T).astype(np.float32)
