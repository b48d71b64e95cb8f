"""Random rows with the response lengths of the target: random for those who suspect that a score is a length score.

Paper: none of its own; the length baseline of arXiv 2503.01807 as a control, since many scores follow length.
Objective: cut the lengths of the target rows at `bins` quantiles, every target group of equal weight; share k over the bins
    by the target's share of each, uniform inside a bin. Bins that run out leave their share to the others in proportion.
Inputs: `cost [n]`, supervised tokens; `target_cost [m]`, those of the target rows; optional `target_groups [m]`.
Cost: O(n log n).
Deviations: nested: row r of a bin of weight w comes at (r + u) / w, so every prefix has the shares of the target, and a bin
    starts at a random point of its first turn. Rows shorter or longer than every target row come last, nearest length
    first. A row's draw depends on (seed, row id) alone.
Defaults: ten bins.
Use: as a control, where the responses of the target are shorter or longer than the pool's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from llmselect.errors import UsageError
from llmselect.kernels.keyed import Keyed
from llmselect.registry import selectors
from llmselect.selectors._base import Picked, Selector


@selectors.register("random_matched")
@dataclass(frozen=True)
class RandomMatched(Selector):
    """Random rows whose lengths are distributed as the target's. Evidence: the `bin` of a row, -1 outside of all."""

    stochastic: ClassVar[bool] = True

    bins: int = field(default=10, metadata={"help": "quantile bins of the target's lengths"})

    def __post_init__(self) -> None:
        if self.bins < 1:
            raise UsageError(f"bins: {self.bins} must be at least 1")

    def pick(self, k: int, rng: Keyed, *, cost: Any, target_cost: Any, target_groups: Any = None) -> Picked:
        lengths, wanted = np.asarray(cost, np.float64), np.asarray(target_cost, np.float64)
        mass = _equal_groups(len(wanted), target_groups)
        ends = _quantiles(wanted, mass, self.bins)
        share = np.bincount(np.searchsorted(ends, wanted), weights=mass)
        outside = np.maximum(0, np.maximum(wanted.min() - lengths, lengths - ends[-1]))
        place = np.where(outside > 0, len(share), np.searchsorted(ends, lengths))
        # The turn of a row in its bin, in a random order of the bin's rows.
        draw = rng.uniform("row")
        by_bin = np.lexsort((rng.keys, draw, place))
        starts = np.searchsorted(place[by_bin], np.arange(len(share) + 1))
        turn = np.empty(len(lengths))
        turn[by_bin] = np.arange(len(lengths)) - starts[place[by_bin]]
        start = np.append(rng.generator("start").random(len(share)), np.inf)  # the bin of rows outside comes last
        time = (turn + start[place]) / np.append(share, 1)[place]
        order = np.lexsort((rng.keys, draw, outside, time))[:k]
        return Picked(order, evidence={"bin": np.where(outside > 0, -1, place)[order]})


def _equal_groups(rows: int, groups: Any) -> np.ndarray:
    """`[m]` weights that sum to 1, the same for every group whatever its number of rows."""
    if groups is None:
        return np.full(rows, 1 / rows)
    group = np.unique(np.asarray(groups), return_inverse=True)[1]
    counts = np.bincount(group)
    return 1.0 / (len(counts) * counts[group])


def _quantiles(values: np.ndarray, mass: np.ndarray, bins: int) -> np.ndarray:
    """Distinct upper ends that cut weighted values into bins of about equal mass; the last is the largest value. A bin holds
    what lies above the end before it, up to and with its own."""
    order = np.argsort(values, kind="stable")
    at = np.searchsorted(np.cumsum(mass[order]), np.arange(1, bins) / bins - 1e-9)
    return np.unique(values[order[np.append(np.minimum(at, len(values) - 1), -1)]])
