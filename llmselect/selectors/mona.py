"""Rows whose monosemantic activations overlap most with the target's.

Paper: MONA, arXiv 2503.15573 v2, section 3.
Objective: per target group the prototype p = mean of its rows' latents; score J(z, p) = Σ_k min(z_k, p_k) /
    Σ_k max(z_k, p_k), the generalised Jaccard similarity; take the highest. Groups take turns, or `across` their mean
    or maximum.
Inputs: `x [n, width]` ≥ 0, sparse or dense (the `sae` feature); `target [m, width]`; optional `target_groups [m]`.
Cost: every non-zero is read once and compared with G prototypes, on all cores; memory O(n·G).
Deviations: none known; `metric` gives the paper's ablations (average over its tasks: Jaccard 66.3, cosine 63.8,
    Euclidean 63.5).
Defaults: Jaccard, turns between groups.
Use: target examples, one forward pass, and a wish to see which latents decided for a row.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np

from llmselect.errors import LlmselectError, UsageError
from llmselect.kernels.groups import round_robin
from llmselect.kernels.jaccard import jaccard, rows_of, sparse_blocks
from llmselect.kernels.keyed import Keyed
from llmselect.kernels.topk import topk_stable
from llmselect.registry import selectors
from llmselect.selectors._base import Picked, Selector


@selectors.register("mona")
@dataclass(frozen=True)
class Mona(Selector):
    """Rows by overlap with a prototype per target group. Evidence: the group that picked the row, the `latent`s that
    decide (largest first) with the row's `value` and the prototype's `target_value`; latent -1 where there are fewer."""

    sparse: ClassVar[bool] = True
    x_sign: ClassVar[str] = "nonnegative"

    metric: Literal["jaccard", "cosine", "euclidean"] = field(default="jaccard", metadata={"help": "similarity to p"})
    across: Literal["round_robin", "mean", "max"] = field(default="round_robin", metadata={"help": "over target groups"})
    evidence: int = field(default=5, metadata={"help": "latents kept per selected row"})

    def __post_init__(self) -> None:
        if self.evidence < 0:
            raise UsageError(f"evidence: {self.evidence} must be 0 or more")

    def pick(self, k: int, rng: Keyed, *, x: Any, target: Any, target_groups: Any = None) -> Picked:
        named = np.zeros(len(target)) if target_groups is None else np.asarray(target_groups)
        groups, group = np.unique(named, return_inverse=True)
        prototypes = np.stack([target[group == g].mean(0, dtype=np.float64) for g in range(len(groups))])
        if not np.isfinite(prototypes).all() or (prototypes < 0).any() or not prototypes.any(1).all():
            raise LlmselectError("a target group has no latent that fires, or values that are negative or not finite")
        scores = np.empty((x.shape[0], len(groups)), np.float32)
        for start, rows in sparse_blocks(x):
            scores[start : start + len(rows)] = self._similarity(rows, prototypes)
        if self.across == "round_robin" and len(groups) > 1:
            order, by = round_robin([topk_stable(s, k, rng.keys) for s in scores.T], k, len(scores))
        else:
            merged = scores.max(1) if self.across == "max" else scores.mean(1, dtype=np.float64)
            order = topk_stable(merged, k, rng.keys)
            by = scores[order].argmax(1)
        return Picked(order, scores, evidence={"group": groups[by], **self._latents(x, order, prototypes, by)})

    def _similarity(self, rows: Any, prototypes: np.ndarray) -> np.ndarray:
        if self.metric == "jaccard":
            return jaccard(rows, prototypes)
        matrix = rows.scipy().astype(np.float64)
        dot, square = matrix @ prototypes.T, np.asarray(matrix.multiply(matrix).sum(1)).reshape(-1, 1)
        norms = (prototypes**2).sum(1)
        if self.metric == "cosine":
            return (dot / np.sqrt(np.where(square > 0, square, 1) * norms)).astype(np.float32)
        return -np.sqrt(np.maximum(square + norms - 2 * dot, 0)).astype(np.float32)

    def _latents(self, x: Any, order: np.ndarray, prototypes: np.ndarray, by: np.ndarray) -> dict[str, np.ndarray]:
        """The latents with the largest min(z_k, p_k) of each selected row."""
        shape = (len(order), self.evidence)
        latent, value, theirs = np.full(shape, -1, np.int32), np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        for i, (columns, values) in enumerate(rows_of(x, order)):
            wanted = prototypes[by[i]][columns]
            shared = np.minimum(values, wanted)
            best = np.argsort(-shared, kind="stable")[: self.evidence]
            best = best[shared[best] > 0]
            latent[i, : len(best)], value[i, : len(best)], theirs[i, : len(best)] = columns[best], values[best], wanted[best]
        return {"latent": latent, "value": value, "target_value": theirs}
