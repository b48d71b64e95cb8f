"""Rows that add most information over a graph of tags, weighted by quality.

Paper: MIG of Chen et al., "MIG: Automatic Data Selection for Instruction Tuning by Maximizing Information Gain in
    Semantic Space", arXiv 2504.13835.
Objective: v_ij = s_i·x_ij of quality s and tags x; W_jl the similarity of two tags where it is above τ, else 0, W_jj = 1,
    off the diagonal times α; P = W with columns that sum to 1; maximise Σ_l φ(Σ_{i∈S} (vP)_il), φ(z) = (z + 1e-6)^0.8, by
    the largest linearised gain Σ_l φ'(Z_l) (vP)_il at each step.
Inputs: `x [n, tags]` ≥ 0, sparse or dense, 1 for each tag of a row (or how far it belongs to a cluster or latent);
    `quality [n]`. Without tags: SAE latents, or soft clusters, `llmselect.clustering.memberships`.
Cost: two readings of the non-zeros, which are held (8 bytes each, on disk above a gigabyte); lazy greedy, tens of gains
    per pick instead of n.
Deviations: the similarity of two tags is the cosine of their columns in the pool, not of embeddings of their names
    (memory: the pairs of tags that occur together; `tau: null` leaves tags apart). Negative qualities are shifted so
    that the smallest is 0.
Defaults: τ = 0.9, α = 1, exponent 0.8, as in the paper.
Use: tags and a quality score; no target.
"""

from __future__ import annotations

# scipy has no types.
# pyright: reportMissingTypeStubs=false
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from llmselect.arrays import Csr
from llmselect.errors import UsageError
from llmselect.kernels.concave import Concave
from llmselect.kernels.greedy import maximize
from llmselect.kernels.keyed import Keyed
from llmselect.kernels.sparse import gathered, gram
from llmselect.kernels.topk import topk_stable
from llmselect.registry import selectors
from llmselect.selectors._base import Picked, Selector


@selectors.register("mig")
@dataclass(frozen=True)
class Mig(Selector):
    """Rows in greedy order of information gain. Evidence: the row's `gain` when it was taken. The report tells how
    many gains were computed."""

    sparse: ClassVar[bool] = True
    x_sign: ClassVar[str] = "nonnegative"

    tau: float | None = field(default=0.9, metadata={"help": "similarity above which tags share mass; null: none do"})
    alpha: float = field(default=1.0, metadata={"help": "weight of other tags against a tag's own"})
    power: float = field(default=0.8, metadata={"help": "exponent of φ"})

    def __post_init__(self) -> None:
        if self.tau is not None and not 0 <= self.tau <= 1:
            raise UsageError(f"tau: {self.tau} must be from 0 to 1, or null")
        if not 0 <= self.alpha < float("inf") or not 0 < self.power <= 1:
            raise UsageError(f"alpha: {self.alpha} must be 0 or more, and power: {self.power} above 0 and at most 1")

    def pick(self, k: int, rng: Keyed, *, x: Any, quality: Any) -> Picked:
        worth = np.asarray(quality, np.float64)
        topk_stable(worth, 0, rng.keys)  # a row without a finite quality is named
        worth = worth - min(0.0, worth.min())
        tags = gathered(x)
        found = maximize(Concave(tags, worth, self._spread(tags), self.power), k, rng)
        report = {"evaluations": found.evaluations}
        return Picked(found.order, evidence={"gain": found.gains}, report=report)

    def _spread(self, tags: Csr) -> Any:
        """P, `[tags, tags]`."""
        import scipy.sparse

        sparse: Any = scipy.sparse
        one = sparse.csr_array(sparse.eye_array(tags.width))
        if self.tau is None:
            return one
        shared = gram(tags)
        square = shared.diagonal()
        scale = sparse.diags_array(1 / np.sqrt(np.where(square > 0, square, 1)))
        similar = sparse.csr_array(scale @ shared @ scale)
        similar.setdiag(0)
        # In float32, or rounding would decide where the cosine of two tags is τ itself (9 of 10 rows in common, say).
        similar.data *= self.alpha * (similar.data.astype(np.float32) > np.float32(self.tau))
        similar.eliminate_zeros()
        weights = one + similar
        return sparse.csr_array(weights @ sparse.diags_array(1 / weights.sum(0)))
