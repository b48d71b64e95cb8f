"""Seeds of an independent cascade: reverse-influence sampling, then greedy cover of the sets sampled.

Paper: Borgs, Brautbar, Chayes, Lucier, "Maximizing Social Influence in Nearly Optimal Time", SODA 2014. An edge v → u
carries with probability p_vu, once. The rows from which a root is reached over edges that carry are its set; the spread
of seeds, the expected number of rows reached, is the expected number of roots whose set holds a seed.

Import it where it is used: numba, which it needs at once, takes a second to import.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from llmselect.errors import LlmselectError
from llmselect.kernels.greedy import maximize
from llmselect.kernels.keyed import Keyed
from llmselect.kernels.room import room

TOGETHER = 1 << 27  # places of a part, 512 MB; the parts lie in files where there are several


@njit(nogil=True, cache=True)
def _mix(x: Any) -> Any:  # pragma: no cover - compiled
    """The SplitMix64 finaliser, as in `kernels.keyed`."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@njit(nogil=True, cache=True)
def _walk(which: int, graph: Any, members: Any, last: Any) -> int:  # pragma: no cover - compiled
    """How many rows the set holds: `members[:…]`; set r·n + i has root i. Whether an edge carries depends on (draw of the root
    and the round, keys of the edge's ends) alone, so it does not depend on the order of rows, and a set can be made again."""
    in_ptr, in_from, in_key, below, keys, draws = graph
    n = len(keys)
    draw = _mix(draws[which % n] + np.uint64(which // n) * np.uint64(0x9E3779B97F4A7C15))
    last[n] += 1  # of this walk
    members[0], last[which % n], count, at = which % n, last[n], 1, 0
    while at < count:
        u = members[at]
        at, mixed = at + 1, _mix(draw ^ keys[u])
        for e in range(in_ptr[u], in_ptr[u + 1]):
            if _mix(mixed + in_key[e]) >> np.uint64(12) < below[e]:  # of 2^52
                v = in_from[e]
                if last[v] != last[n]:
                    members[count], last[v] = v, last[n]
                    count += 1
    return count


@njit(nogil=True, cache=True)
def _sample(first: int, sets: int, most: int, graph: Any, last: Any, found: Any) -> Any:  # pragma: no cover - compiled
    """Rows of sets from `first` on, one set after another, until there are `most`: the number of rows and the next set. The first
    row i of a set, its root, is written as -1 - i."""
    total = 0
    for which in range(first, sets):
        if total >= most:
            return total, which
        count = _walk(which, graph, found[total:], last)
        found[total], total = -1 - found[total], total + count
    return total, sets


@njit(nogil=True, cache=True)
def _fill(found: Any, first: int, place: Any, holding: Any) -> None:  # pragma: no cover - compiled
    which = first - 1
    for row in found:
        if row < 0:
            row, which = -1 - row, which + 1
        holding[place[row]] = which
        place[row] += 1


@njit(nogil=True, cache=True)
def _reach(holding: Any, graph: Any, members: Any, last: Any, held: Any, new: Any) -> None:  # pragma: no cover - compiled
    for which in holding:
        if not held[which]:
            held[which] = True
            for at in range(_walk(which, graph, members, last)):
                new[members[at]] -= 1


class _Cover:
    """f(S) = the number of sets that hold a row of S, an objective of `kernels.greedy`.

    In each of `parts`, of the sets one after another, those that hold row i are `holding[start[i] : start[i + 1]]`. The rows of
    a set are not kept: it is made again when a row of it is taken.
    """

    def __init__(self, graph: tuple[np.ndarray, ...], sets: int):
        n = len(graph[0]) - 1
        self.graph, self.members, self.last = graph, np.empty(n, np.int32), np.zeros(n + 1, np.int64)
        self.held, self.new, self.parts = np.zeros(sets, bool), np.zeros(n, np.int64), list[tuple[np.ndarray, np.ndarray]]()
        end = 0
        while end < sets:
            end = self._part(end, sets)

    def _part(self, first: int, sets: int) -> int:
        found = np.empty(TOGETHER + len(self.new), np.int32)
        total, end = _sample(first, sets, TOGETHER, self.graph, self.last, found)
        found = found[:total]
        count = np.bincount(np.where(found < 0, -1 - found, found), minlength=len(self.new))
        start = np.concatenate([[0], np.cumsum(count)])
        filled = np.empty(total, np.int32 if sets < 1 << 31 else np.int64)
        _fill(found, first, start[:-1].copy(), filled)
        if end < sets or first:
            holding = room(filled.shape, filled.dtype, 0)
            holding[:] = filled
            filled = holding
        self.new += count
        self.parts.append((start.astype(np.int32 if total < 1 << 31 else np.int64), filled))
        return end

    def bounds(self) -> np.ndarray:
        return self.new

    def gains(self, rows: np.ndarray) -> np.ndarray:
        return self.new[rows]

    def add(self, row: int) -> None:
        for start, holding in self.parts:
            _reach(holding[start[row] : start[row + 1]], self.graph, self.members, self.last, self.held, self.new)


def cascade_seeds(graph: Any, k: int, rng: Keyed, rounds: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """`k` rows in greedy order of spread, and by how many rows each adds to it (estimated); ties by key.

    Args:
        graph: `scipy.sparse [n, n]`, p_vu in row v, column u, each in [0, 1].
        rounds: sets sampled per root; every row is a root equally often, and of all rows alike.

    Time: that of making the sets, those that hold a row taken twice. Memory: 4 bytes for each row of each set, n · rounds · (mean
    number of rows that reach a row) in all, in files above half a gigabyte. Errors: `LlmselectError` for numbers that are no
    probabilities.
    """
    into = graph.tocsc()
    if not ((into.data >= 0) & (into.data <= 1)).all():
        raise LlmselectError("graph: its values must be probabilities, from 0 to 1")
    keys, draws = rng.keys.astype(np.uint64), (rng.uniform("cascade") * 2.0**52).astype(np.uint64)
    ends: np.ndarray = into.indices.astype(np.int32, copy=False)
    below = np.ceil(into.data.astype(np.float64) * 2.0**52 - 0.5).astype(np.uint64)  # an edge carries when its bits are less
    edges = into.indptr.astype(np.int64), ends, keys[ends], below, keys, draws
    found = maximize(_Cover(edges, len(keys) * rounds), min(k, len(keys)), rng)
    return found.order, found.gains / rounds
