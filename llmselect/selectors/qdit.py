"""Good rows that lie near to all others: quality and facility location in one greedy order.

Paper: QDIT of Bukharin et al., "Data Diversity Matters for Robust Instruction Tuning", arXiv 2311.14736, section 3.
Objective: greedily the row i of largest (1 - α)·[F(S ∪ {i}) - F(S)] + α·q_i, F(S) = Σ_v max_{j ∈ S} max(0, cos_vj).
Inputs: `x [n, d]`, an embedding; `quality [n]`.
Cost: the kNN graph (FAISS); lazy greedy, O(edges) for the few gains that may still win.
Deviations: gains count neighbours only, as in `facility_location`. So that α weighs numbers of one size, gains are divided by
    the largest first gain, and qualities scaled to [0, 1] by their minimum and maximum.
Defaults: α = 0.5, 64 neighbours.
Use: a quality score and a subset that still covers the pool; `alpha` weighs the two.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llmselect.errors import UsageError
from llmselect.kernels.filtering import check_finite
from llmselect.kernels.greedy import maximize
from llmselect.kernels.keyed import Keyed
from llmselect.kernels.neighbours import neighbours
from llmselect.kernels.objectives import Coverage
from llmselect.kernels.rows import Rows
from llmselect.kernels.topk import topk_stable
from llmselect.registry import selectors
from llmselect.selectors._base import Picked, Selector


class _Weighed:
    """(1 - α)·coverage + α·Σ quality, an objective of `kernels.greedy`."""

    def __init__(self, coverage: Coverage, quality: np.ndarray, alpha: float):
        self.coverage, self.bonus = coverage, alpha * quality
        self.scale = (1 - alpha) / coverage.bounds().max()

    def bounds(self) -> np.ndarray:
        return self.scale * self.coverage.bounds() + self.bonus

    def gains(self, rows: np.ndarray) -> np.ndarray:
        return self.scale * self.coverage.gains(rows) + self.bonus[rows]

    def add(self, row: int) -> None:
        self.coverage.add(row)


@selectors.register("qdit")
@dataclass(frozen=True)
class Qdit(Selector):
    """Rows by what they add to coverage, and by quality. Evidence: the `gain` of each when it was taken, both parts."""

    alpha: float = field(default=0.5, metadata={"help": "weight of quality; 0 is facility location, 1 the best rows"})
    neighbours: int = field(default=64, metadata={"help": "edges per row of the graph"})

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1 or self.neighbours < 1:
            raise UsageError(f"alpha: {self.alpha} must be from 0 to 1, and neighbours: {self.neighbours} at least 1")

    def pick(self, k: int, rng: Keyed, *, x: Any, quality: Any) -> Picked:
        worth = np.asarray(quality, np.float64)
        topk_stable(worth, 0, rng.keys)  # a row without a finite quality is named
        check_finite(x)
        by_key = np.argsort(rng.keys, kind="stable")
        worth = (worth - worth.min()) / (np.ptp(worth) or 1.0)
        coverage = Coverage(*neighbours(Rows(x, order=by_key), self.neighbours))
        found = maximize(_Weighed(coverage, worth[by_key], self.alpha), k, Keyed(rng.seed, rng.keys[by_key]))
        report = {"evaluations": found.evaluations}
        return Picked(by_key[found.order], evidence={"gain": found.gains}, report=report)
