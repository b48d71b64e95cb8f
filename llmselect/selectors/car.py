"""The best rows by a score, and the best of every cluster.

Paper: CaR of Ge et al., "Clustering and Ranking: Diversity-preserved Instruction Selection through Expert-aligned
    Quality Estimation", arXiv 2402.18191.
Objective: n₁ rows of the largest quality of all, and n₂ of the largest quality of each cluster.
Inputs: `quality [n]`; `groups [n]`, the cluster (or source) of each row.
Cost: O(n log n).
Deviations: a budget of k rows instead of n₁ and n₂: a `share` of the places goes to the best rows of all, the others to
    rounds over the clusters, the cluster whose next row is best first; every row once. The order is nested.
Defaults: half and half (ours).
Use: a score that is trusted, and topics or sources of which none should be lost.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llmselect.errors import UsageError
from llmselect.kernels.groups import rounds
from llmselect.kernels.keyed import Keyed
from llmselect.kernels.topk import topk_stable
from llmselect.registry import selectors
from llmselect.selectors._base import Picked, Selector


@selectors.register("car")
@dataclass(frozen=True)
class Car(Selector):
    """Rows by quality, in part over all and in part per cluster. Evidence: the row's `group`, and whether its place was
    one of the `cluster` places."""

    share: float = field(default=0.5, metadata={"help": "of the places for the best rows whatever their cluster"})

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise UsageError(f"share: {self.share} must be from 0 to 1")

    def pick(self, k: int, rng: Keyed, *, quality: Any, groups: Any) -> Picked:
        scores = np.asarray(quality, np.float64)
        names, group = np.unique(np.asarray(groups), return_inverse=True)
        ranked = [topk_stable(scores, len(scores), rng.keys), rounds(group, -scores, -scores, rng.keys)]
        taken, at = np.zeros(len(scores), bool), [0, 0]
        order, places = np.empty(k, np.int64), np.diff(np.floor(self.share * np.arange(k + 1) + 1e-9)) == 0
        for i, which in enumerate(places.astype(int)):
            while taken[ranked[which][at[which]]]:
                at[which] += 1
            order[i] = ranked[which][at[which]]
            taken[order[i]] = True
        return Picked(order, scores, evidence={"group": names[group[order]], "cluster": places})
