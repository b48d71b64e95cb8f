"""The same rows every epoch: a selection as a schedule.

Paper: none.
Objective: every epoch trains on the selected rows, in a new random order, with the weights of the selection.
Inputs: none; the rows are a field, `Static.of(selection)` takes them from a selection.
Cost: O(n) per epoch.
Deviations: none.
Defaults: all rows of the pool, with weight 1.
Use: a selection in the code that runs the other schedules.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from llmselect.dynamic.schedules._base import Epoch, EpochSchedule, permutation
from llmselect.errors import UsageError
from llmselect.kernels.keyed import Keyed
from llmselect.registry import schedules
from llmselect.selection import Selection


@schedules.register("static")
@dataclass(frozen=True)
class Static(EpochSchedule):
    """Constant rows."""

    indices: tuple[int, ...] | None = field(default=None, metadata={"help": "row numbers; null: all rows"})
    weights: tuple[float, ...] | None = field(default=None, metadata={"help": "one for each of them; null: 1"})
    pool: int | None = field(default=None, metadata={"help": "rows of the pool they belong to, checked when given"})

    def __post_init__(self) -> None:
        if self.indices is not None and not (len(self.indices) and min(self.indices) >= 0):
            raise UsageError("indices: give at least one row number, from 0; null for all rows")
        if self.weights is not None and (self.indices is None or len(self.weights) != len(self.indices)):
            raise UsageError("weights: give one for each of indices")

    @classmethod
    def of(cls, selection: Selection) -> Static:
        """The schedule of a selection, with its weights if it has any."""
        weights = None if selection.weights is None else tuple(map(float, selection.weights))
        return cls(tuple(map(int, selection.indices)), weights, selection.n)

    def size(self, epoch: int, epochs: int, n: int) -> int:
        return n if self.indices is None else len(self.indices)

    def rows(self, epoch: int, epochs: int, n: int, rng: Keyed, losses: np.ndarray | None = None) -> Epoch:
        if (self.pool or n) != n or (self.indices is not None and max(self.indices) >= n):
            raise UsageError(f"static: rows of a pool of {self.pool or max(self.indices or ()) + 1}, but this one has {n}")
        chosen = np.arange(n) if self.indices is None else np.asarray(self.indices, np.int64)
        weights = np.ones(n)
        if self.weights is not None:
            weights[chosen] = self.weights
        order = permutation(rng, f"order/{epoch}", chosen)
        return Epoch(order, weights[order])
