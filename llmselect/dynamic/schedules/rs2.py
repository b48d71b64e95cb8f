"""A fresh random subset every epoch: the baseline of equal compute for every static subset.

Paper: RS2, arXiv 2305.18424, section 3 (repeated sampling of random subsets, with and without replacement).
Objective: epoch t trains on k rows. Without replacement, rows t·k … (t+1)·k − 1 of an endless walk through random
    permutations of the pool, a new one when the last is used up: every row is seen once before any is seen twice. With
    replacement, k distinct rows drawn from the whole pool, independently in every epoch.
Inputs: none (the number of rows).
Cost: O(n log n) per epoch, O(n) memory; no pass of a model.
Deviations: an epoch that straddles two permutations can hold a row twice, once from each; the paper does not say.
    A draw depends on (seed, permutation or epoch, row id) alone.
Defaults: 10 % of the rows, one of the paper's rates; without replacement.
Use: the baseline for a static subset that is trained on for several epochs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llmselect.dynamic.schedules._base import Epoch, EpochSchedule, permutation
from llmselect.errors import UsageError
from llmselect.kernels.keyed import Keyed
from llmselect.registry import schedules
from llmselect.selection import Budget


@schedules.register("rs2")
@dataclass(frozen=True)
class Rs2(EpochSchedule):
    """Repeated random subsets."""

    budget: Any = field(default="10%", metadata={"help": "rows of an epoch: a number, a percentage or a fraction"})
    replacement: bool = field(default=False, metadata={"help": "draw every epoch from the whole pool"})

    def __post_init__(self) -> None:
        if Budget.parse(self.budget).tokens is not None:
            raise UsageError('budget: rs2 counts rows; give a number of rows, "10%" or 0.1')

    def size(self, epoch: int, epochs: int, n: int) -> int:
        return Budget.parse(self.budget).rows_of(n)

    def rows(self, epoch: int, epochs: int, n: int, rng: Keyed, losses: np.ndarray | None = None) -> Epoch:
        k = self.size(epoch, epochs, n)
        if self.replacement:
            return Epoch(permutation(rng, f"rs2/epoch/{epoch}")[:k], np.ones(k))
        first, last = epoch * k // n, (epoch * k + k - 1) // n
        walk = np.concatenate([permutation(rng, f"rs2/pass/{p}") for p in range(first, last + 1)])
        start = epoch * k - first * n
        return Epoch(walk[start : start + k], np.ones(k))
