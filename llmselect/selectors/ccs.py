"""Coverage-centric selection: the hardest rows dropped, the others spread evenly over the range of the score.

Paper: Zheng et al., "Coverage-centric Coreset Selection for High Pruning Rates", arXiv 2210.15809.
Objective: drop the ⌊βn⌋ hardest rows; cut the scores of the others into `bins` strata; waterfill k over the strata,
    uniform inside each.
Inputs: `x [n]`, any score, or `[n, T]`, the score at T checkpoints or models, of which the mean counts (as EL2N, GraNd and AIGN
    are defined); `hard` tells which end is the hard one.
Cost: O(n log n).
Deviations: the order is nested: rounds over the strata, so that every prefix has waterfill shares up to the rows that
    its last round lacks; a budget of more than n - ⌊βn⌋ rows gets the dropped rows last, the easiest of them first.
    `quantile` and `log` strata are ours, for scores with a heavy tail, where almost all rows lie in a few equal widths:
    `quantile` cuts at equal counts, `log` at equal widths of log(1 + (x - min) / median(x - min)), the median over
    rows above the minimum.
Defaults: β = 0.1, 50 strata of equal width, the largest scores are the hardest (loss, gradient norm).
Use: no target, a difficulty score, and a small budget, for which the hardest rows alone would be noise.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np

from llmselect.errors import UsageError
from llmselect.kernels.keyed import Keyed
from llmselect.kernels.strata import Strata, covering
from llmselect.registry import selectors
from llmselect.selectors._base import Picked, Selector


@selectors.register("ccs")
@dataclass(frozen=True)
class Ccs(Selector):
    """Random rows with equal shares of every stratum of a score. Evidence: the row's `score` and `stratum`, counted from
    the smallest score; -1 for a dropped row."""

    stochastic: ClassVar[bool] = True
    x_ndim: ClassVar[tuple[int, ...]] = (1, 2)

    beta: float = field(default=0.1, metadata={"help": "share of the pool, the hardest rows, that is dropped"})
    bins: int = field(default=50, metadata={"help": "strata"})
    strata: Strata = field(default="range", metadata={"help": "see Deviations"})
    hard: Literal["largest", "smallest"] = field(default="largest", metadata={"help": "which scores are the hard ones"})

    def __post_init__(self) -> None:
        if not 0 <= self.beta < 1:
            raise UsageError(f"beta: {self.beta} must be at least 0 and below 1")
        if self.bins < 1:
            raise UsageError(f"bins: {self.bins} must be at least 1")

    def pick(self, k: int, rng: Keyed, *, x: Any) -> Picked:
        score = np.asarray(x[:], np.float64).reshape(x.shape[0], -1).mean(1)
        # Within a round the strata come in a random order, or a small budget would always favour the same ones.
        order, stratum = covering(score, self.beta, self.bins, self.strata, rng.uniform("row"), rng.uniform("round"), rng.keys,
                                  self.hard == "largest")  # fmt: skip
        order = order[:k]
        return Picked(order, score, evidence={"score": score[order], "stratum": stratum[order]})
