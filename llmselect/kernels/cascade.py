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
from llmselect.kernels.graph import Into
from llmselect.kernels.greedy import maximize
from llmselect.kernels.keyed import Keyed
from llmselect.kernels.room import room
from llmselect.kernels.rows import BLOCK

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
    (start, source, chance), source_key, keys, draws = graph
    n = len(keys)
    draw = _mix(draws[which % n] + np.uint64(which // n) * np.uint64(0x9E3779B97F4A7C15))
    last[n] += 1  # of this walk
    members[0], last[which % n], count, at = which % n, last[n], 1, 0
    while at < count:
        u = members[at]
        at, mixed = at + 1, _mix(draw ^ keys[u])
        for e in range(start[u], start[u + 1]):
            if float(_mix(mixed + source_key[e]) >> np.uint64(12)) + 0.5 < float(chance[e]) * 2.0**52:
                v = source[e]
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
def _count(found: Any, count: Any) -> None:  # pragma: no cover - compiled
    for row in found:
        count[row if row >= 0 else -1 - row] += 1


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

    def __init__(self, edges: Into, rng: Keyed, sets: int):
        n, keys = len(rng.keys), rng.keys.astype(np.uint64, copy=False)
        draws = (rng.uniform("cascade") * 2.0**52).astype(np.uint64)
        source_key = room(edges.source.shape, np.uint64)  # in the order that they are read in
        for first in range(0, len(source_key), BLOCK):
            source_key[first : first + BLOCK] = keys[edges.source[first : first + BLOCK]]
        self.graph, self.members, self.last = (edges, source_key, keys, draws), np.empty(n, np.int32), np.zeros(n + 1, np.int64)
        self.held, self.new, self.parts = np.zeros(sets, bool), np.zeros(n, np.int64), list[tuple[np.ndarray, np.ndarray]]()
        end = 0
        while end < sets:
            end = self._part(end, sets)

    def _part(self, first: int, sets: int) -> int:
        found, start = np.empty(TOGETHER + len(self.new), np.int32), np.zeros(len(self.new) + 1, np.int64)
        total, end = _sample(first, sets, TOGETHER, self.graph, self.last, found)
        found = found[:total]
        _count(found, start[1:])
        self.new += start[1:]
        np.cumsum(start, out=start)
        holding = np.empty(total, np.int32 if sets < 1 << 31 else np.int64)
        _fill(found, first, start[:-1].copy(), holding)
        start = start.astype(np.int32 if total < 1 << 31 else np.int64)
        self.parts.append((_filed(start), _filed(holding)) if end < sets or first else (start, holding))
        return end

    def bounds(self) -> np.ndarray:
        return self.new

    def gains(self, rows: np.ndarray) -> np.ndarray:
        return self.new[rows]

    def add(self, row: int) -> None:
        for start, holding in self.parts:
            _reach(holding[start[row] : start[row + 1]], self.graph, self.members, self.last, self.held, self.new)


def _filed(array: np.ndarray) -> np.ndarray:
    """A copy in a file."""
    out = room(array.shape, array.dtype, 0)
    out[:] = array
    return out


def cascade_seeds(edges: Into, k: int, rng: Keyed, rounds: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """`k` rows in greedy order of spread, and by how many rows each adds to it (estimated); ties by key.

    Args:
        edges: p_vu of the edges from v into each row u, each in [0, 1].
        rounds: sets sampled per root; every row is a root equally often, and of all rows alike.

    Time: that of making the sets, those that hold a row taken twice. Memory: 16 bytes an edge, on disk above a gigabyte; 4 for
    each row of each set, n · rounds · (mean number of rows that reach a row) in all, in files above half a gigabyte. Errors:
    `LlmselectError` for numbers that are no probabilities.
    """
    if not (edges.chance.min(initial=0) >= 0 and edges.chance.max(initial=1) <= 1):
        raise LlmselectError("edges: their chances must be probabilities, from 0 to 1")
    found = maximize(_Cover(edges, rng, len(rng.keys) * rounds), min(k, len(rng.keys)), rng)
    return found.order, found.gains / rounds
