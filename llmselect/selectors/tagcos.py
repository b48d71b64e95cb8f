"""Rows whose gradients make up the mean gradient of every cluster.

Paper: TAGCOS of Zhang et al., "Task-agnostic Gradient Clustered Coreset Selection for Instruction Tuning Data", arXiv
    2407.15235, section 3.
Objective: k-means on unit gradients; waterfill k over the clusters; in each, orthogonal matching pursuit of the cluster's mean
    gradient ḡ: the row with the largest ⟨g_i, r⟩, r = ḡ minus its projection on the rows before.
Inputs: `x [n, d]`, the `gradient` feature; no target.
Cost: k-means, and O(n·d) per round of picks; memory O(largest share · d).
Deviations: the order is nested: rounds over the clusters, the largest first, so that every prefix has waterfill shares up to
    the rows that its last round lacks. Rows are not weighted. Where rows already span ḡ, it is matched anew by others.
Defaults: a cluster per 200 rows, 2 to 100.
Use: no target; gradients are affordable.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from llmselect.errors import UsageError
from llmselect.kernels.groups import rounds, waterfill
from llmselect.kernels.keyed import Keyed
from llmselect.kernels.kmeans import kmeans
from llmselect.kernels.pursuit import pursue
from llmselect.kernels.rows import BLOCK, Rows
from llmselect.registry import selectors
from llmselect.selectors._base import Picked, Selector


@selectors.register("tagcos")
@dataclass(frozen=True)
class Tagcos(Selector):
    """Rows in rounds over clusters of gradients. Evidence: the row's `cluster`, and `left`, the share of the cluster's mean
    that the rows up to this one do not span."""

    stochastic: ClassVar[bool] = True

    clusters: int | None = field(default=None, metadata={"help": "of gradients; null: one per 200 rows, 2 to 100"})

    def __post_init__(self) -> None:
        if self.clusters is not None and self.clusters < 1:
            raise UsageError(f"clusters: {self.clusters} must be at least 1")

    def pick(self, k: int, rng: Keyed, *, x: Any) -> Picked:
        rows = Rows(x)
        made = kmeans(rows, self.clusters or min(len(rows), max(2, min(100, len(rows) // 200))), rng)
        sizes = made.sizes
        shares = np.minimum(waterfill(k, sizes) + 1, sizes)  # one more: which clusters the last round leaves out is up to it
        turn, left = np.full(len(rows), len(rows)), np.zeros(len(rows))
        for cluster in np.flatnonzero(sizes):
            members = np.flatnonzero(made.label == cluster)
            members = members[np.argsort(rng.keys[members], kind="stable")]
            order, share = pursue(rows, members, _mean(rows, members), int(shares[cluster]), rng.keys)
            turn[order], left[order] = np.arange(len(order)), share
        found = rounds(made.label, turn, -sizes[made.label], rng.keys)[:k]
        return Picked(found, evidence={"cluster": made.label[found], "left": left[found]})


def _mean(x: Rows, members: np.ndarray) -> np.ndarray:
    parts = [x.gather(members[at : at + BLOCK]).sum(0) for at in range(0, len(members), BLOCK)]
    return np.sum(parts, axis=0) / len(members)
