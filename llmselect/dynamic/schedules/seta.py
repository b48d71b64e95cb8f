"""Leave out redundant rows at random, then rows too easy or too hard for now, from easy to hard.

Paper: SeTa, arXiv 2503.13385, section 3 (random pruning, grouping by loss, sliding window, annealing).
Objective: every epoch keeps ⌈keep · n⌉ random rows, groups them by one-dimensional k-means of their last losses into G
    groups, and trains on w = ⌈α·G⌉ neighbouring groups. The window starts at the easiest group, moves on by one every
    epoch and begins again when it has reached the hardest. The last epochs use the random rows of all groups.
Inputs: the losses of the training itself.
Cost: O(n log n) per epoch; no pass of a model beyond training.
Deviations: k-means starts from quantiles, so that nothing in it is random. Rows without a finite loss (all of them in
    the first epoch) stay. Epoch t puts the window at group max(t − 1, 0) mod (G − w + 1): the first epoch has no losses
    unless they are given; the published code has t in place of t − 1, so that its second epoch is not the easiest.
    Fewer distinct losses than G make fewer groups.
Defaults: G = 10, α = 0.5 and annealing in the last ⌈12.5 %⌉ of epochs are those of the published code; keep 0.9 is that
    of its CIFAR script.
Use: training on all rows over several epochs in less time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import ceil
from typing import ClassVar

import numpy as np

from llmselect.dynamic.schedules._base import Epoch, EpochSchedule, annealing, check_share, permutation
from llmselect.errors import UsageError
from llmselect.kernels.intervals import intervals
from llmselect.kernels.keyed import Keyed
from llmselect.registry import schedules


@schedules.register("seta")
@dataclass(frozen=True)
class SeTa(EpochSchedule):
    """A window over groups of like loss."""

    needs_losses: ClassVar[bool] = True

    keep: float = field(default=0.9, metadata={"help": "part of the rows that an epoch draws at random"})
    groups: int = field(default=10, metadata={"help": "groups of like loss"})
    alpha: float = field(default=0.5, metadata={"help": "part of the groups inside the window"})
    anneal: float = field(default=0.125, metadata={"help": "last part of the epochs, in which all groups are used"})

    def __post_init__(self) -> None:
        check_share("keep", self.keep, above=0)
        check_share("alpha", self.alpha, above=0)
        check_share("anneal", self.anneal)
        if self.groups < 1:
            raise UsageError(f"groups: {self.groups} must be at least 1")

    def size(self, epoch: int, epochs: int, n: int) -> int:
        return ceil(self.keep * n - 1e-9)

    def rows(self, epoch: int, epochs: int, n: int, rng: Keyed, losses: np.ndarray | None = None) -> Epoch:
        kept = permutation(rng, f"seta/{epoch}")[: self.size(epoch, epochs, n)]
        if losses is not None and not annealing(epoch, epochs, self.anneal):
            known = np.isfinite(losses[kept])
            label = intervals(losses[kept][known], self.groups)
            start, stop = self.window(epoch, int(label.max(initial=-1)) + 1)
            inside = ~known
            inside[known] = (label >= start) & (label < stop)
            kept = kept[inside]
        return Epoch(kept, np.ones(len(kept)))

    def window(self, epoch: int, groups: int) -> tuple[int, int]:
        """The first group of the window in this epoch and the one after its last, easiest 0, of `groups` groups."""
        width = ceil(self.alpha * groups - 1e-9)
        start = max(epoch - 1, 0) % (groups - width + 1)
        return start, start + width
