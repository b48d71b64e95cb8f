"""Diverse rows as the greedy maximum of a set function.

Paper: k-center: Gonzalez 1985, for subsets of training data Sener and Savarese, arXiv 1708.00489; facility location, graph
    cut and log-determinant as in Iyer et al., arXiv 2006.15412; DPP inference: Chen et al., arXiv 1709.05135.
Objective: on unit rows, `kcenter`: the row farthest from those taken; `facility_location`: Σ_i max_{j ∈ S} max(0, cos_ij)
    over a graph of nearest neighbours; `graph_cut`: Σ_{i, j ∈ S} s_ij over the pool minus λ Σ_{i, j ∈ S} s_ij, s = (1 + cos)/2;
    `log_det`: log det(I + α X_S X_Sᵀ).
Inputs: `x [n, d]`, an embedding; no target.
Cost: lazy greedy: bounds in order, and gains for the few rows that may still win. kcenter O(d) per row and centre looked at;
    facility_location a kNN graph (FAISS) and O(edges); graph_cut O(d) a gain; log_det O(dim) a row and row taken since it was
    looked at, O(dim²) at most. All but facility_location bring the bounds of all rows up to date in float32 whenever gains of
    one row in 32 have been asked for, kcenter and log_det against every row taken since: O(n·k·d) in all; they
    hold 256 MB of the rows last asked for and of those that come next. Where log_det takes many more rows than there are
    columns, gains are nearly equal and lazy looks at far more of them: `stochastic` does not.
Deviations: facility location counts only rows among the `neighbours` of one another; log_det folds features wider than `dim`.
Defaults: lazy greedy, the same rows as naive greedy; `stochastic` looks at a random n/k · ln(1/ε) rows a step.
Use: no target; near copies are many and rare rows matter.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from llmselect.errors import UsageError
from llmselect.kernels import objectives
from llmselect.kernels.greedy import Objective, Optimizer, maximize
from llmselect.kernels.keyed import Keyed
from llmselect.kernels.neighbours import neighbours
from llmselect.kernels.rows import Rows
from llmselect.registry import selectors
from llmselect.selectors._base import Picked, Selector


@dataclass(frozen=True)
class _SetFunction(Selector):
    """Evidence: the `gain` of each row when it was taken. The report tells the value reached and the gains computed."""

    optimizer: Optimizer = field(default="lazy", metadata={"help": "lazy equals naive; stochastic is faster and random"})
    epsilon: float = field(default=0.01, metadata={"help": "of stochastic greedy"})

    def __post_init__(self) -> None:
        if not 0 < self.epsilon < 1:
            raise UsageError(f"epsilon: {self.epsilon} must lie between 0 and 1")

    @property
    def stochastic(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride] - depends on the optimizer here
        return self.optimizer == "stochastic"

    @property
    def nested(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride] - on the optimizer too
        return self.optimizer != "stochastic"  # its samples are larger for smaller budgets

    def _maximum(self, objective: Objective, k: int, rng: Keyed) -> Picked:
        found = maximize(objective, k, rng, self.optimizer, self.epsilon)
        report = {"value": float(np.sum(found.gains)), "evaluations": found.evaluations}
        return Picked(found.order, evidence={"gain": found.gains.astype(np.float32)}, report=report)


@selectors.register("kcenter")
@dataclass(frozen=True)
class KCenter(_SetFunction):
    """Rows each of which lies farthest from those before it."""

    def pick(self, k: int, rng: Keyed, *, x: Any) -> Picked:
        return self._maximum(objectives.Spread(Rows(x)), k, rng)


@selectors.register("facility_location")
@dataclass(frozen=True)
class FacilityLocation(_SetFunction):
    """Rows that together lie near to all others."""

    neighbours: int = field(default=64, metadata={"help": "edges per row of the graph"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.neighbours < 1:
            raise UsageError(f"neighbours: {self.neighbours} must be at least 1")

    def pick(self, k: int, rng: Keyed, *, x: Any) -> Picked:
        by_key = np.argsort(rng.keys, kind="stable")  # of equal rows, keys decide which are neighbours
        coverage = objectives.Coverage(*neighbours(Rows(x, order=by_key), self.neighbours))
        found = self._maximum(coverage, k, Keyed(rng.seed, rng.keys[by_key]))
        return replace(found, order=by_key[found.order])


@selectors.register("graph_cut")
@dataclass(frozen=True)
class GraphCut(_SetFunction):
    """Rows that are like the pool and unlike one another."""

    penalty: float = field(default=0.5, metadata={"help": "λ; up to 0.5 the function is monotone"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.penalty < 0:  # gains would grow with the set, which no greedy order here is made for
            raise UsageError(f"penalty: {self.penalty} must be 0 or more")

    def pick(self, k: int, rng: Keyed, *, x: Any) -> Picked:
        return self._maximum(objectives.GraphCut(Rows(x), self.penalty), k, rng)


@selectors.register("log_det")
@dataclass(frozen=True)
class LogDet(_SetFunction):
    """Rows that span a large volume."""

    scale: float = field(default=10.0, metadata={"help": "α; small values stop telling directions apart"})
    dim: int = field(default=1024, metadata={"help": "wider features are folded to this many columns"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.scale > 0 or self.dim < 1:
            raise UsageError(f"scale: {self.scale} must be above 0, and dim: {self.dim} at least 1")

    def pick(self, k: int, rng: Keyed, *, x: Any) -> Picked:
        return self._maximum(objectives.LogDet(Rows(x, dim=self.dim), self.scale), k, rng)
