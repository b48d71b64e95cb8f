"""Seeds of an independent cascade: reverse-influence sampling, then greedy cover of the sets sampled.

Paper: Borgs, Brautbar, Chayes, Lucier, "Maximizing Social Influence in Nearly Optimal Time", SODA 2014. An edge v → u
carries with probability p_vu, once. The rows from which a root is reached over edges that carry are its set; the spread
of seeds, the expected number of rows reached, is the expected number of roots whose set holds a seed.

Import it where it is used: numba, which it needs at once, takes a second to import.
"""

from __future__ import annotations

# scipy.sparse has no types.
# pyright: reportMissingTypeStubs=false
from typing import Any

import numpy as np
from numba import njit

from llmselect.errors import LlmselectError
from llmselect.kernels.greedy import maximize
from llmselect.kernels.keyed import Keyed


@njit(nogil=True, cache=True)
def _mix(x: Any) -> Any:  # pragma: no cover - compiled
    """The SplitMix64 finaliser, as in `kernels.keyed`."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@njit(nogil=True, cache=True)
def _sets(in_ptr: Any, in_from: Any, chance: Any, keys: Any, draws: Any, rounds: int) -> Any:  # pragma: no cover - compiled
    """CSR of the rows in each set; set r·n + i has root i. Whether an edge carries depends on (draw of the root and the
    round, keys of the edge's ends) alone, so it does not depend on the order of rows."""
    n = len(keys)
    ptr, members, count = np.zeros(n * rounds + 1, np.int64), np.empty(4 * n * rounds + 1, np.int32), 0
    last = np.full(n, -1, np.int64)
    for which in range(n * rounds):
        draw = _mix(draws[which % n] + np.uint64(which // n) * np.uint64(0x9E3779B97F4A7C15))
        ptr[which], at = count, count
        members[count], last[which % n] = which % n, which
        count += 1
        while at < count:
            if count + in_ptr[members[at] + 1] - in_ptr[members[at]] >= len(members):
                members = np.concatenate((members, np.empty(count + n, np.int32)))
            u = members[at]
            at += 1
            for e in range(in_ptr[u], in_ptr[u + 1]):
                v = in_from[e]
                bits = _mix(_mix(draw ^ keys[u]) + keys[v])
                if last[v] != which and (float(bits >> np.uint64(12)) + 0.5) * 2.0**-52 < chance[e]:
                    members[count], last[v] = v, which
                    count += 1
    ptr[-1] = count
    return ptr, members[:count]


class _Cover:
    """f(S) = the number of sets that hold a row of S, an objective of `kernels.greedy`."""

    def __init__(self, sets: Any):
        self.sets, self.back = sets, sets.tocsc()
        self.held, self.new = np.zeros(sets.shape[0], bool), np.diff(self.back.indptr)

    def bounds(self) -> np.ndarray:
        return self.new

    def gains(self, rows: np.ndarray) -> np.ndarray:
        return self.new[rows]

    def add(self, row: int) -> None:
        holding = self.back.indices[self.back.indptr[row] : self.back.indptr[row + 1]]
        holding = holding[~self.held[holding]]
        self.held[holding] = True
        np.subtract.at(self.new, self.sets[holding].indices, 1)


def cascade_seeds(graph: Any, k: int, rng: Keyed, rounds: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """`k` rows in greedy order of spread, and by how many rows each adds to it (estimated); ties by key.

    Args:
        graph: `scipy.sparse [n, n]`, p_vu in row v, column u, each in [0, 1].
        rounds: sets sampled per root; every row is a root equally often, and of all rows alike.

    Time and memory: that of the sets, n · rounds · (mean number of rows that reach a row). Errors: `LlmselectError` for
    numbers that are no probabilities.
    """
    from scipy.sparse import csr_array

    into = graph.tocsc()
    if not ((into.data >= 0) & (into.data <= 1)).all():
        raise LlmselectError("graph: its values must be probabilities, from 0 to 1")
    keys, draws = rng.keys.astype(np.uint64), (rng.uniform("cascade") * 2.0**52).astype(np.uint64)
    chance = into.data.astype(np.float64)
    ptr, members = _sets(into.indptr.astype(np.int64), into.indices.astype(np.int32), chance, keys, draws, rounds)
    sets = csr_array((np.ones(len(members), np.bool_), members, ptr), shape=(len(ptr) - 1, len(keys)))
    found = maximize(_Cover(sets), min(k, len(keys)), rng)
    return found.order, found.gains / rounds
