"""The best rows by a score, without those that are too near to a better one.

Paper: DEITA of Liu et al., "What Makes Good Data for Alignment?", arXiv 2312.15685 (score first, diversity
    aware).
Objective: go through the rows from the best score down; keep a row if its cosine to every row kept before is at most
    `limit`; stop at k.
Inputs: `x [n, d]`, an embedding; `quality [n]`, the score, or `[n, S]` ≥ 0, scores whose product counts (in the paper
    complexity × quality, both graded by a model); in a recipe a list of features.
Cost: O(rows reached · k · d) time in blocks, O(n + k·d) memory; one more reading of `x` checks it.
Deviations: where fewer than k rows are far enough apart, the rejected ones follow in the order of their scores.
Defaults: limit 0.9, as in the paper.
Use: a quality score, and a pool with many near copies.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from llmselect.errors import LlmselectError, UsageError
from llmselect.kernels.filtering import check_finite, keep_apart
from llmselect.kernels.keyed import Keyed
from llmselect.kernels.topk import topk_stable
from llmselect.registry import selectors
from llmselect.selectors._base import Picked, Selector


@selectors.register("deita")
@dataclass(frozen=True)
class Deita(Selector):
    """Rows by score, near copies of better rows left out. Evidence: `cosine` to the nearest row kept before, -1 for the
    first."""

    quality_ndim: ClassVar[tuple[int, ...]] = (1, 2)

    limit: float = field(default=0.9, metadata={"help": "largest cosine to a row kept before"})

    def __post_init__(self) -> None:
        if not -1 <= self.limit <= 1:
            raise UsageError(f"limit: {self.limit} is no cosine; give -1 to 1")

    def pick(self, k: int, rng: Keyed, *, x: Any, quality: Any) -> Picked:
        scores = np.asarray(quality, np.float64)
        if scores.ndim == 2 and scores.shape[1] > 1 and len(bad := np.flatnonzero((scores < 0).any(1))):
            raise LlmselectError(f"quality: rows {bad[:5].tolist()} have negative scores, whose product ranks nothing")
        scores = scores.reshape(len(scores), -1).prod(1)
        ranked = topk_stable(scores, len(scores), rng.keys)
        check_finite(x)
        kept, rejected, nearest = keep_apart(x, ranked, k, self.limit)
        order = np.concatenate([kept, rejected])[:k]
        return Picked(order, scores, evidence={"cosine": nearest[order]})
