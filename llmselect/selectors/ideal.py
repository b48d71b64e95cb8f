"""Rows from which a cascade over the graph of nearest neighbours reaches most of the pool.

Paper: IDEAL of Zhang et al., arXiv 2310.10873; by reverse-influence sampling instead of Monte Carlo: Borgs et al., SODA 2014.
Objective: an edge from every row v to each of its `neighbours` nearest rows u carries with probability p_vu = max(0, cos_vu)
    / Σ_u max(0, cos_vu), once; greedily the rows whose spread, the expected number of rows reached, is largest.
Inputs: `x [n, d]`, an embedding; no target.
Cost: the kNN graph (FAISS), 16 bytes an edge, and the sets sampled, n · `rounds` times the mean number of rows that reach a
    row, 4 bytes each; on disk above a gigabyte, the sets above half.
Deviations: the spread is estimated once, on `rounds` sets of rows that reach each row, and covered greedily: the same
    objective as simulating cascades for every candidate.
Defaults: 10 neighbours, 10 rounds.
Use: no target; rows that stand for those around them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from llmselect.errors import UsageError
from llmselect.kernels.filtering import check_finite
from llmselect.kernels.graph import Into, into
from llmselect.kernels.keyed import Keyed
from llmselect.kernels.neighbours import neighbours
from llmselect.kernels.rows import BLOCK, Rows
from llmselect.registry import selectors
from llmselect.selectors._base import Picked, Selector


@selectors.register("ideal")
@dataclass(frozen=True)
class Ideal(Selector):
    """Rows by the influence they add. Evidence: `gain`, the rows that each adds to those reached."""

    stochastic: ClassVar[bool] = True

    neighbours: int = field(default=10, metadata={"help": "edges out of a row"})
    rounds: int = field(default=10, metadata={"help": "sets sampled per row; the error of a gain falls with its root"})

    def __post_init__(self) -> None:
        if self.neighbours < 1 or self.rounds < 1:
            raise UsageError(f"neighbours: {self.neighbours} and rounds: {self.rounds} must be at least 1")

    def pick(self, k: int, rng: Keyed, *, x: Any) -> Picked:
        from llmselect.kernels.cascade import cascade_seeds

        check_finite(x)
        by_key = np.argsort(rng.keys, kind="stable")
        edges = self._edges(Rows(x, order=by_key))
        order, gains = cascade_seeds(edges, k, Keyed(rng.seed, rng.keys[by_key]), self.rounds)
        return Picked(by_key[order], evidence={"gain": gains})

    def _edges(self, x: Rows) -> Into:
        """p, of at most `neighbours` edges out of a row."""
        near, chance = neighbours(x, self.neighbours)
        for first in range(0, len(near), BLOCK):
            weight = np.maximum(chance[first : first + BLOCK], 0).astype(np.float64)  # 0 too where there is no neighbour
            total = weight.sum(1, keepdims=True)
            chance[first : first + BLOCK] = weight / np.where(total > 0, total, 1)  # in its place: as long as the pool
        return into(near, chance)
