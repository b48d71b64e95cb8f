"""The best, worst or middle rows of any score, combined over target groups.

Paper: none; TRIM (arXiv 2510.07118) ranks this way, as do perplexity and IFD filters.
Objective: one column: the k largest (or smallest; or `middle`: those whose rank is nearest to that of the median, so
    that the k rows are centred on it). Several columns, one per target group: `round_robin` lets the groups take turns,
    each giving its best row not yet taken; `mean` (by `weights`, if given) and `max` rank by the mean or the largest over
    groups, or over the scores of several features (`x: [a, b]`).
Inputs: `x [n]` or `[n, G]`.
Cost: O(G·(n + k log k)); `middle` sorts, O(G·n log n).
Deviations: `middle` scores a row by -|rank - (n - 1) / 2|, equal scores sharing their mean rank.
Defaults: round robin, because scores of different tasks are not comparable; `standardize` makes columns comparable
    (mean 0, sd 1 over the pool) for `mean` and `max`.
Use: any score, an extractor's or your own; on `trim` it is TRIM.
"""

from __future__ import annotations

# scipy has no types.
# pyright: reportMissingTypeStubs=false
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np

from llmselect.errors import UsageError
from llmselect.kernels.groups import round_robin
from llmselect.kernels.keyed import Keyed
from llmselect.kernels.topk import topk_stable
from llmselect.registry import selectors
from llmselect.selectors._base import Picked, Selector


@selectors.register("topk")
@dataclass(frozen=True)
class TopK(Selector):
    """Rows by score, best first."""

    x_ndim: ClassVar[tuple[int, ...]] = (1, 2)

    order: Literal["desc", "asc", "middle"] = field(default="desc", metadata={"help": "desc: the largest first"})
    reduce: Literal["round_robin", "mean", "max"] = field(default="round_robin", metadata={"help": "over target groups"})
    standardize: bool = field(default=False, metadata={"help": "z-score each group's column before mean or max"})
    weights: tuple[float, ...] | None = field(default=None, metadata={"help": "of the columns, for reduce: mean; null: equal"})

    def __post_init__(self) -> None:
        if self.weights is not None and (self.reduce != "mean" or min(self.weights, default=-1) < 0 or not sum(self.weights)):
            raise UsageError(f"weights: {list(self.weights)} must not be negative nor all zero, and need reduce: mean")
        if self.standardize and self.reduce == "round_robin":
            raise UsageError("standardize: columns that take turns are never compared; give reduce: mean or max too")

    def pick(self, k: int, rng: Keyed, *, x: Any) -> Picked:
        scores = np.array(x[:]).reshape(x.shape[0], -1)
        topk_stable(scores.sum(1, dtype=np.float64), 0, rng.keys)  # a row without a finite score is named, not averaged
        if self.order == "middle":
            scores = np.stack([_centrality(column) for column in scores.T], axis=1)
        largest = self.order != "asc"
        if self.reduce == "round_robin" and scores.shape[1] > 1:
            lists = [topk_stable(column, k, rng.keys, largest=largest) for column in scores.T]
            order, group = round_robin(lists, k, len(scores))
            return Picked(order, scores, evidence={"group": group, "score": scores[order, group]})
        columns = scores.astype(np.float64)
        if self.standardize:
            columns = (columns - columns.mean(0)) / np.where(columns.std(0) > 0, columns.std(0), 1)
        best = columns.max(1) if largest else columns.min(1)  # "max" means the best group, whichever end is best
        if self.weights is not None and len(self.weights) != columns.shape[1]:
            raise UsageError(f"weights: {len(self.weights)} are given, x has {columns.shape[1]} columns")
        combined = best if self.reduce == "max" else np.average(columns, axis=1, weights=self.weights)
        order = topk_stable(combined, k, rng.keys, largest=largest)
        return Picked(order, combined.astype(np.result_type(scores, np.float32)), evidence={"score": combined[order]})


def _centrality(column: np.ndarray) -> np.ndarray:
    import scipy.stats

    stats: Any = scipy.stats
    return -np.abs(stats.rankdata(column.astype(np.float64)) - (len(column) + 1) / 2)
