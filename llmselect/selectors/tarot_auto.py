"""TAROT that finds its own size: the neighbours whose distribution lies nearest to targets that did not choose them.

Paper: TAROT, arXiv 2412.00420, section 4 (optimal transport minimisation, OTM).
Objective: targets in F folds. In each fold 1/F of them choose the union of their k nearest rows (whitened cosine > 0) and
    the others judge: c_k = OT(uniform(chosen), uniform(judges)). k grows until c_k has not fallen for `patience` steps; the
    best set of each fold is kept; the result is their union, the nearest rows first.
Inputs: `x [n, d]`, `target [m, d]` with m ≥ 2; optional `target_groups [m]`, spread evenly over the folds.
Cost: one GEMM n × m × d after whitening; per step the costs of new rows, and a transport from the last potentials.
Deviations: exact transport instead of Sinkhorn with ε = 1e-4: the same curve without its bias; the best set, not that of the
    failing step. The budget is an upper limit; with "100%" the size is the method's own.
Defaults: ten folds, patience 1 as in the paper.
Use: target examples, and the size of the subset is itself the question.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np

from llmselect.errors import LlmselectError, UsageError
from llmselect.kernels.cosine import best_per_target
from llmselect.kernels.keyed import Keyed
from llmselect.kernels.transport import exact
from llmselect.registry import selectors
from llmselect.selectors._base import Picked, Selector
from llmselect.selectors.tarot import distances, whitened


@selectors.register("tarot_auto")
@dataclass(frozen=True)
class TarotAuto(Selector):
    """The union of the best set of each fold. Evidence: `nearest` target row, whitened `distance`, and `layer`, the k at
    which the row was first chosen. The report holds the curve c_k of every fold, its best k, and the ratio found."""

    nested: ClassVar[bool] = False
    chooses_size: ClassVar[bool] = True

    folds: int = field(default=10, metadata={"help": "parts of the target rows"})
    patience: int = field(default=1, metadata={"help": "steps without a lower cost before stopping"})
    whiten: Literal["cholesky", "zca", "none"] = field(default="cholesky", metadata={"help": "none: cosines as they are"})
    ridge: float = field(default=1e-3, metadata={"help": "share of the mean variance that is added to every direction"})
    dim: int = field(default=2048, metadata={"help": "wider features are folded to this many columns"})

    def __post_init__(self) -> None:
        if self.folds < 2 or self.patience < 1 or min(self.ridge, self.dim) <= 0:
            raise UsageError("folds must be at least 2, patience at least 1, ridge and dim positive")

    def pick(self, k: int, rng: Keyed, *, x: Any, target: Any, target_groups: Any = None) -> Picked:
        x, targets = whitened(x, target, self.whiten, self.ridge, self.dim)
        if len(targets) < 2:
            raise UsageError("tarot_auto needs at least 2 target rows: some choose and others judge; 'tarot' takes one")
        named = np.zeros(len(targets)) if target_groups is None else np.asarray(target_groups)
        fold = np.argsort(np.argsort(named, kind="stable")) % min(self.folds, len(targets))
        search = _Search(x, targets, rng.keys)
        first: dict[int, int] = {}
        curves: list[dict[str, Any]] = []
        for f in range(fold.max() + 1):
            curve, best, chosen = self._fold(search, fold == f)
            curves.append({"curve": curve, "best": best})
            first |= {row: min(at, first.get(row, at)) for row, at in chosen.items()}
        rows, layer = (np.array(list(one), np.int64) for one in (first.keys(), first.values()))
        distance = distances(x[rows], targets)
        order = np.lexsort((rng.keys[rows], distance.min(1), layer))[:k]
        distance = distance[order]
        evidence = {"nearest": distance.argmin(1), "distance": distance.min(1), "layer": layer[order]}
        return Picked(rows[order], search.largest, None, evidence, {"ratio": len(rows) / len(x), "folds": curves})

    def _fold(self, search: _Search, choosers: np.ndarray) -> tuple[list[float], int, dict[int, int]]:
        """The curve, the best k (counted from 1), and the rows chosen up to it with the k of each."""
        chosen: dict[int, int] = {}
        cost, start = np.zeros((0, int((~choosers).sum()))), None
        curve, best, value = list[float](), 0, np.inf
        while not curve or len(curve) - best < self.patience:
            named = search.nearest(choosers, len(curve))
            if named is None:
                break
            if new := [row for row in named if row not in chosen]:
                chosen |= dict.fromkeys(new, len(curve) + 1)
                cost = np.concatenate([cost, search.distances(new, len(curve))[:, ~choosers]])
                if start is not None:  # new rows enter at the potential that the judges offer them
                    start = np.concatenate([start[0], (cost[-len(new) :] - start[1]).min(1)]), start[1]
                found = exact(cost, start)
                start, value = (found.source, found.target), round(found.value, 9)  # last bits must not decide
            best = len(curve) + 1 if value < min(curve, default=np.inf) else best
            curve.append(value)
        return curve, best, {row: at for row, at in chosen.items() if at <= best}


class _Search:
    """The neighbours of every target with cosine > 0, nearest first, found deeper on demand."""

    def __init__(self, x: Any, targets: np.ndarray, keys: np.ndarray):
        self.x, self.targets, self.keys = x, targets, keys
        self.place, self.known = dict[int, int](), np.zeros((0, len(targets)), np.float32)
        self._deepen(64)
        if not any(self.lists):
            raise LlmselectError("tarot_auto: no row of the pool points towards any target (all cosines ≤ 0)")

    def _deepen(self, depth: int) -> None:
        self.depth = min(depth, len(self.x))
        best, self.largest = best_per_target(self.x, self.targets, self.depth, self.keys)
        self.lists = [rows[cosine > 0].tolist() for rows, cosine in best]

    def nearest(self, choosers: np.ndarray, at: int) -> list[int] | None:
        """The rows that the choosers name at place `at`; None when all their lists have ended."""
        if self.depth <= at < len(self.x):
            self._deepen(2 * self.depth)
        found = [self.lists[j][at] for j in np.flatnonzero(choosers) if at < len(self.lists[j])]
        return list(dict.fromkeys(found)) or None

    def distances(self, rows: list[int], at: int) -> np.ndarray:
        """Distances `[r, m]` of rows named at place `at` to all targets; computed once, for several places together."""
        if not self.place.keys() >= set(rows):
            soon = {row for one in self.lists for row in one[at : at + 16]} | set(rows)
            more = sorted(soon - self.place.keys())
            self.place |= {row: len(self.known) + i for i, row in enumerate(more)}
            self.known = np.concatenate([self.known, distances(self.x[np.array(more)], self.targets)])
        return self.known[[self.place[row] for row in rows]]
