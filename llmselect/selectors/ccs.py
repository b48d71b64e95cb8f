"""Coverage-centric selection: the hardest rows dropped, the others spread evenly over the range of the score.

Paper: Zheng et al., "Coverage-centric Coreset Selection for High Pruning Rates", arXiv 2210.15809.
Objective: drop the ⌊βn⌋ hardest rows; cut the scores of the others into `bins` strata; waterfill k over the strata,
    uniform inside each.
Inputs: `x [n]`, any score; `hard` tells which end is the hard one.
Cost: O(n log n).
Deviations: the order is nested: rounds over the strata, so that every prefix has waterfill shares up to the rows that
    its last round lacks; a budget of more than n - ⌊βn⌋ rows gets the dropped rows last, the easiest of them first.
    `quantile` and `log` strata are ours, for scores with a heavy tail, where almost all rows lie in a few equal widths:
    `quantile` cuts at equal counts, `log` at equal widths of log(1 + (x - min) / median(x - min)), the median over
    rows above the minimum.
Defaults: β = 0.1, 50 strata of equal width, the largest scores are the hardest (loss, gradient norm).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np

from llmselect.errors import UsageError
from llmselect.kernels.groups import rounds
from llmselect.kernels.keyed import Keyed
from llmselect.kernels.topk import topk_stable
from llmselect.registry import selectors
from llmselect.selectors._base import Picked, Selector


@selectors.register("ccs")
@dataclass(frozen=True)
class Ccs(Selector):
    """Random rows with equal shares of every stratum of a score. Evidence: the row's `score` and `stratum`, counted from
    the smallest score; -1 for a dropped row."""

    stochastic: ClassVar[bool] = True
    x_ndim: ClassVar[tuple[int, ...]] = (1,)

    beta: float = field(default=0.1, metadata={"help": "share of the pool, the hardest rows, that is dropped"})
    bins: int = field(default=50, metadata={"help": "strata"})
    strata: Literal["range", "quantile", "log"] = field(default="range", metadata={"help": "see Deviations"})
    hard: Literal["largest", "smallest"] = field(default="largest", metadata={"help": "which scores are the hard ones"})

    def __post_init__(self) -> None:
        if not 0 <= self.beta < 1:
            raise UsageError(f"beta: {self.beta} must be at least 0 and below 1")
        if self.bins < 1:
            raise UsageError(f"bins: {self.bins} must be at least 1")

    def pick(self, k: int, rng: Keyed, *, x: Any) -> Picked:
        score = np.asarray(x[:], np.float64)
        hardest = topk_stable(score, int(self.beta * len(score) + 1e-9), rng.keys, largest=self.hard == "largest")
        kept = np.delete(np.arange(len(score)), hardest)
        stratum = np.full(len(score), -1)
        stratum[kept] = self._strata(score[kept], rng.keys[kept])
        # Within a round the strata come in a random order, or a small budget would always favour the same ones.
        draw, place = rng.uniform("row")[kept], rng.uniform("round")[kept]
        order = np.concatenate([kept[rounds(stratum[kept], draw, place, rng.keys[kept])], hardest[::-1]])[:k]
        return Picked(order, score, evidence={"score": score[order], "stratum": stratum[order]})

    def _strata(self, score: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """The stratum of each row, 0 … bins - 1."""
        if self.strata == "quantile":
            out = np.empty(len(score), np.int64)
            out[np.lexsort((keys, score))] = np.arange(len(score)) * self.bins // len(score)
            return out
        above = score - score.min()
        if self.strata == "log":
            above = np.log1p(above / np.median(above[above > 0])) if above.any() else above
        width = above.max() / self.bins or 1.0
        return np.minimum((above / width).astype(np.int64), self.bins - 1)
