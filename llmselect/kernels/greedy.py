"""Greedy maximisation of set functions with diminishing returns: naive, lazy and stochastic.

Papers: lazy evaluation, Minoux 1978; stochastic greedy, Mirzasoleiman et al., arXiv 1409.7938.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from llmselect.kernels.keyed import Keyed

Optimizer = Literal["lazy", "stochastic", "naive"]
BATCH = 1024


class Objective(Protocol):
    """A set function under construction: f(S ∪ {i}) - f(S) never grows as S does."""

    def bounds(self) -> np.ndarray:
        """`[n]`: the gains for the empty set, or anything above them."""
        ...

    def gains(self, rows: np.ndarray) -> np.ndarray:
        """f(S ∪ {i}) - f(S) of each i in `rows`."""
        ...

    def add(self, row: int) -> None:
        """S becomes S ∪ {row}."""
        ...


@dataclass(frozen=True, eq=False)
class Greedy:
    """Rows in the order taken, the gain of each, and how many gains were computed."""

    order: np.ndarray
    gains: np.ndarray
    evaluations: int


def maximize(objective: Objective, k: int, rng: Keyed, optimizer: Optimizer = "lazy", epsilon: float = 0.01) -> Greedy:
    """Take `k` rows, each the one of largest gain; equal gains (in float32) by ascending key.

    `naive` computes every gain at every step; `lazy` gives the same rows and computes only those whose old gain, an upper
    bound, could still win; `stochastic` looks at a random n/k · ln(1/ε) rows a step: value ≥ (1 - 1/e - ε) of the best in
    expectation.
    """
    if optimizer == "lazy":
        return _lazy(objective, k, rng.keys)
    return _scanning(objective, k, rng, epsilon if optimizer == "stochastic" else None)


def _rounded(gains: np.ndarray) -> np.ndarray:
    # Sums in another order differ in the last bits of fp64; ties must not be decided by those.
    return np.asarray(gains, np.float64).astype(np.float32)


def _lazy(objective: Objective, k: int, keys: np.ndarray) -> Greedy:
    bound = _rounded(objective.bounds())
    heap = list(zip((-bound).tolist(), keys.tolist(), range(len(bound)), strict=True))
    heapq.heapify(heap)
    fresh = np.full(len(bound), -1, np.int64)
    order, gains, evaluations = list[int](), list[float](), 0
    while len(order) < k:
        size = 16
        while fresh[heap[0][2]] != len(order):
            batch: list[tuple[float, int, int]] = []
            while heap and len(batch) < size and fresh[heap[0][2]] != len(order):
                batch.append(heapq.heappop(heap))
            rows = np.array([row for _, _, row in batch], np.int64)
            fresh[rows] = len(order)
            evaluations += len(rows)
            for value, (_, key, row) in zip((-_rounded(objective.gains(rows))).tolist(), batch, strict=True):
                heapq.heappush(heap, (value, key, row))
            size = min(BATCH, 2 * size)
        value, _, row = heapq.heappop(heap)
        objective.add(row)
        order.append(row)
        gains.append(-value)
    return Greedy(np.array(order, np.int64), np.array(gains), evaluations)


def _scanning(objective: Objective, k: int, rng: Keyed, epsilon: float | None) -> Greedy:
    left = np.argsort(rng.keys, kind="stable")  # by key, so that draws do not depend on the order of the pool
    n, draw = len(left), rng.generator("greedy")
    share = n if epsilon is None else max(1, math.ceil(n / max(k, 1) * math.log(1 / epsilon)))
    order, gains, evaluations = list[int](), list[float](), 0
    for _ in range(k):
        at = np.arange(len(left)) if share >= len(left) else np.sort(draw.choice(len(left), share, replace=False))
        value = np.concatenate([_rounded(objective.gains(left[at[i : i + BATCH]])) for i in range(0, len(at), BATCH)])
        evaluations += len(at)
        best = int(at[int(value.argmax())])  # the first of equal ones has the smallest key
        order.append(int(left[best]))
        gains.append(float(value.max()))
        objective.add(order[-1])
        left = np.delete(left, best)
    return Greedy(np.array(order, np.int64), np.array(gains), evaluations)
