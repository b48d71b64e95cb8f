"""Greedy maximisation of set functions with diminishing returns: naive, lazy and stochastic.

Papers: lazy evaluation, Minoux 1978; stochastic greedy, Mirzasoleiman et al., arXiv 1409.7938.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np

from llmselect.kernels.keyed import Keyed

Optimizer = Literal["lazy", "stochastic", "naive"]
BATCH = 1024
REFRESH = 32  # bounds of all rows are asked for again after gains of one in so many
Entry = tuple[float, int, int]  # minus the bound, key, row


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


@runtime_checkable
class Refreshing(Protocol):
    """An objective that brings the bounds of all rows up to date in less time than their gains take."""

    def refresh(self) -> np.ndarray:
        """`[n]`: the gains for S as it is, or anything above them."""
        ...

    def expect(self, rows: np.ndarray) -> None:
        """Gains of `rows`, none of them in S, are asked for next, in this order as far as they are needed."""
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


class Queue:
    """Rows by bound, largest first, equal ones by key: sorted once; those that come back with another bound lie in a heap."""

    def __init__(self, bound: np.ndarray, keys: np.ndarray, rows: np.ndarray):
        self.rows = rows[np.lexsort((keys[rows], -bound[rows]))]
        self.bound, self.keys, self.at = bound, keys, 0
        self.back, self.next = list[Entry](), list[Entry]()
        self._read()

    def _read(self) -> None:
        if not self.next:
            part = self.rows[self.at : self.at + BATCH][::-1]
            self.at += len(part)
            self.next = list(zip((-self.bound[part]).tolist(), self.keys[part].tolist(), part.tolist(), strict=True))

    def first(self) -> Entry | None:
        """The entry that `pop` would give, or None when there is none."""
        if not self.next or (self.back and self.back[0] < self.next[-1]):
            return self.back[0] if self.back else None
        return self.next[-1]

    def pop(self) -> Entry:
        """The entry of largest bound; it goes."""
        if not self.next or (self.back and self.back[0] < self.next[-1]):
            return heapq.heappop(self.back)
        entry = self.next.pop()
        self._read()
        return entry

    def push(self, entry: Entry) -> None:
        """A row that is still there is then there twice."""
        heapq.heappush(self.back, entry)


def _lazy(objective: Objective, k: int, keys: np.ndarray) -> Greedy:
    bound = _rounded(objective.bounds())
    queue, left, looked = Queue(bound, keys, np.arange(len(bound))), np.ones(len(bound), bool), 0
    fresh = np.full(len(bound), -1, np.int64)
    order, gains, evaluations, refreshed = list[int](), list[float](), 0, 0
    while len(order) < k:
        size = 16
        while (first := queue.first()) and fresh[first[2]] != len(order):
            if looked * REFRESH > len(bound) and refreshed < len(order) and isinstance(objective, Refreshing):
                bound = np.minimum(bound, _rounded(objective.refresh()))  # the gain itself where it is fresh
                queue = Queue(bound, keys, np.flatnonzero(left))
                objective.expect(queue.rows[: len(bound) // REFRESH])
                evaluations, looked, refreshed = evaluations + looked, 0, len(order)
                continue
            batch: list[Entry] = []
            while len(batch) < size and (first := queue.first()) and fresh[first[2]] != len(order):
                batch.append(queue.pop())
            rows = np.array([row for _, _, row in batch], np.int64)
            fresh[rows], looked = len(order), looked + len(rows)
            bound[rows] = _rounded(objective.gains(rows))
            for value, (_, key, row) in zip((-bound[rows]).tolist(), batch, strict=True):
                queue.push((value, key, row))
            size = min(BATCH, 2 * size)
        value, _, row = queue.pop()
        objective.add(row)
        order.append(row)
        gains.append(-value)
        left[row] = False
    return Greedy(np.array(order, np.int64), np.array(gains), evaluations + looked)


def _scanning(objective: Objective, k: int, rng: Keyed, epsilon: float | None) -> Greedy:
    left = np.argsort(rng.keys, kind="stable")  # by key, so that draws do not depend on the order of the pool
    n, draw = len(left), rng.generator("greedy")
    share = n if epsilon is None else max(1, math.ceil(n / max(k, 1) * math.log(1 / epsilon)))
    order, gains, evaluations = list[int](), list[float](), 0
    for count in range(n, n - k, -1):
        at = np.arange(count) if share >= count else np.sort(draw.choice(count, share, replace=False))
        value = np.concatenate([_rounded(objective.gains(left[at[i : i + BATCH]])) for i in range(0, len(at), BATCH)])
        evaluations += len(at)
        most = at[value == value.max()]
        best = int(most[np.argmin(rng.keys[left[most]])])
        order.append(int(left[best]))
        gains.append(float(value.max()))
        objective.add(order[-1])
        left[best] = left[count - 1]  # in its place, as to close the gap takes time that grows with the pool
    return Greedy(np.array(order, np.int64), np.array(gains), evaluations)
