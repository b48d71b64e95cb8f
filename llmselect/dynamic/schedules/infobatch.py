"""Drop a random part of the rows that are already learned, and make the others among them count for more.

Paper: InfoBatch, arXiv 2303.04947, section 2 (soft pruning, rescaling, annealing).
Objective: with ℓᵢ the last loss of row i and ℓ̄ the mean of those known, a row with ℓᵢ < ℓ̄ is left out with probability r;
    if it stays its loss counts 1/(1 − r) times, so that the expected gradient of an epoch is that of all rows. All others
    stay with weight 1. In the last ⌈δ·E⌉ of E epochs nothing is left out.
Inputs: the losses of the training itself.
Cost: O(n log n) per epoch; no pass of a model beyond training.
Deviations: each row is drawn on its own, as in the paper's formula, so the number left out varies (the published code
    draws a fixed number). The weight multiplies the row's tokens in the loss of its step, which is a mean over tokens.
    Rows without a finite loss stay with weight 1. The paper writes δ for the point where annealing starts (0.875).
Defaults: r = 0.5 and δ = 0.125, the paper's. At least the last epoch uses all rows, as in the published code.
Use: training on all rows over several epochs in less time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from llmselect.dynamic.schedules._base import Epoch, EpochSchedule, annealing, check_share, permutation
from llmselect.kernels.keyed import Keyed
from llmselect.registry import schedules


@schedules.register("infobatch")
@dataclass(frozen=True)
class InfoBatch(EpochSchedule):
    """Unbiased pruning of the rows below the mean loss."""

    needs_losses: ClassVar[bool] = True

    r: float = field(default=0.5, metadata={"help": "probability that a row below the mean loss is left out"})
    anneal: float = field(default=0.125, metadata={"help": "last part of the epochs, in which all rows are used"})

    def __post_init__(self) -> None:
        check_share("r", self.r, below=1)
        check_share("anneal", self.anneal)

    def size(self, epoch: int, epochs: int, n: int) -> int:
        return n

    def rows(self, epoch: int, epochs: int, n: int, rng: Keyed, losses: np.ndarray | None = None) -> Epoch:
        low = np.zeros(n, bool)
        known = np.zeros(n, bool) if losses is None else np.isfinite(losses)
        if losses is not None and known.any() and not annealing(epoch, epochs, self.anneal):
            # Sorted, or the rounding of the sum would depend on the order of the pool.
            low[known] = losses[known] < np.sort(losses[known].astype(np.float64)).mean()
        kept = np.flatnonzero(~low | (rng.uniform(f"infobatch/{epoch}") >= self.r))
        order = permutation(rng, f"order/{epoch}", kept)
        return Epoch(order, np.where(low[order], 1 / (1 - self.r), 1.0))
