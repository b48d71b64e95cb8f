"""Nearest rows to the target by cosine.

Paper: RDS+ with `combine: round_robin` on position-weighted embeddings: Ivison et al., arXiv 2503.01807, section 3; LESS
    with `combine: centroid, across: max` on gradient features: Xia et al., arXiv 2402.04333, section 4 (its published
    code: `combine: mean`).
Objective: c_ij = ⟨x_i, t_j⟩ / ‖x_i‖‖t_j‖. Within a target group: `mean` or `max` of c_ij over its rows, or
    `round_robin`: every target row is a query and gives its nearest row not yet taken; `centroid`: the cosine with the
    mean unit target, which ranks a group as `mean` does but compares groups of any spread alike. Over groups `across`: turns,
    mean or max.
Inputs: `x [n, d]`, `target [m, d]`, optional `target_groups [m]`.
Cost: one GEMM n × d × m in blocks; `mean` needs n × d × G only, since the mean cosine is the product with the mean unit
    target. n × m is never held; round robin keeps O(k) candidates.
Deviations: `centroid` takes target rows as unit vectors; LESS averages the gradients with their lengths.
Defaults: round robin in both, because cosines of different tasks are not comparable.
Use: target examples and one forward pass: the first to try. On `gradient` features it is LESS.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np

from llmselect.errors import UsageError
from llmselect.kernels.cosine import best_per_target, similarity_blocks, unit, unit_targets
from llmselect.kernels.groups import round_robin
from llmselect.kernels.keyed import Keyed
from llmselect.kernels.topk import topk_stable
from llmselect.kernels.turns import queries_in_turn
from llmselect.registry import selectors
from llmselect.selectors._base import Picked, Selector

Combine = Literal["round_robin", "mean", "max", "centroid"]
Across = Literal["round_robin", "mean", "max"]


@selectors.register("similarity")
@dataclass(frozen=True)
class Similarity(Selector):
    """Rows by cosine to the target rows. Evidence: `nearest` target row, its `cosine`, and `query`, who picked the row."""

    combine: Combine = field(default="round_robin", metadata={"help": "over the target rows of a group"})
    across: Across = field(default="round_robin", metadata={"help": "over target groups"})

    def __post_init__(self) -> None:
        if self.combine == "round_robin" and self.across != "round_robin":
            raise UsageError("combine: round_robin ranks no scores, so across: must be round_robin too")

    def pick(self, k: int, rng: Keyed, *, x: Any, target: Any, target_groups: Any = None) -> Picked:
        targets = unit_targets(target)
        named = np.zeros(len(targets)) if target_groups is None else np.asarray(target_groups)
        group = np.unique(named, return_inverse=True)[1]
        if self.combine == "round_robin":
            best = partial(best_per_target, x, targets, keys=rng.keys)
            order, query, largest = queries_in_turn(best, group, k, x.shape[0])
            picked = Picked(order, largest, evidence={"query": query})
        else:
            picked = self._scored(k, rng, x, targets, group)
        rows = unit(x[picked.order]) @ targets.T if len(picked.order) * len(targets) < 1 << 26 else None
        if rows is None:
            return picked
        evidence = {"nearest": rows.argmax(1), "cosine": rows.max(1), **(picked.evidence or {})}
        return Picked(picked.order, picked.scores, evidence=evidence)

    def _scored(self, k: int, rng: Keyed, x: Any, targets: np.ndarray, group: np.ndarray) -> Picked:
        groups = np.unique(group)
        means = np.stack([targets[group == g].mean(0) for g in groups])
        if self.combine == "centroid":
            means = unit_targets(means)
        columns = np.empty((x.shape[0], len(groups)), np.float32)
        for start, block in similarity_blocks(x, targets if self.combine == "max" else means):
            if self.combine == "max":
                block = np.stack([block[:, group == g].max(1) for g in groups], axis=1)
            columns[start : start + len(block)] = block
        if self.across == "round_robin" and len(groups) > 1:
            order, picker = round_robin([topk_stable(c, k, rng.keys) for c in columns.T], k, len(columns))
            return Picked(order, columns, evidence={"group": picker})
        scores = columns.max(1) if self.across == "max" else columns.mean(1)
        return Picked(topk_stable(scores, k, rng.keys), scores)
