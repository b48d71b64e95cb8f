"""Difficult rows from all over the pool: difficulty passed along a graph of nearest neighbours.

Paper: D2 pruning of Maharana et al., "Message Passing for Balancing Data Diversity & Difficulty for Data Pruning", arXiv
    2310.07931, section 3.
Objective: s_i = q_i + Σ_{j ∈ N(i)} exp(-γ_f d_ij) q_j with difficulty q and d the squared distance of unit rows; then
    repeatedly the row i of largest s, after which s_j ← s_j - exp(-γ_r d_ij) s_i for its neighbours j.
Inputs: `x [n, d]`, an embedding; `quality [n]`, a difficulty (loss, EL2N, IFD).
Cost: the kNN graph (FAISS); O(n · neighbours · log n) time, 16 bytes an edge, on disk above a gigabyte.
Deviations: neighbours of either side are neighbours. Difficulties are shifted so that the smallest is 0; a constant one
    ranks nothing, and rows then go by id.
Defaults: 10 neighbours, γ_f = γ_r = 1; the paper tunes both.
Use: no target; a difficulty score that near rows should confirm.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from llmselect.errors import UsageError
from llmselect.kernels.filtering import check_finite
from llmselect.kernels.graph import Graph, undirected
from llmselect.kernels.greedy import Queue
from llmselect.kernels.keyed import Keyed
from llmselect.kernels.neighbours import neighbours
from llmselect.kernels.rows import Rows
from llmselect.kernels.topk import topk_stable
from llmselect.registry import selectors
from llmselect.selectors._base import Picked, Selector


@selectors.register("d2")
@dataclass(frozen=True)
class D2(Selector):
    """Rows by difficulty that their neighbours share and that no neighbour picked before has taken. Evidence: `message`, s
    of the row when it was picked."""

    neighbours: int = field(default=10, metadata={"help": "edges out of a row"})
    gamma_forward: float = field(default=1.0, metadata={"help": "γ_f: how fast difficulty that is passed on fades"})
    gamma_reverse: float = field(default=1.0, metadata={"help": "γ_r: the smaller, the more diverse"})

    def __post_init__(self) -> None:
        if self.neighbours < 1 or self.gamma_forward < 0 or self.gamma_reverse < 0:
            raise UsageError("neighbours must be at least 1, gamma_forward and gamma_reverse not be negative")

    def pick(self, k: int, rng: Keyed, *, x: Any, quality: Any) -> Picked:
        worth = np.asarray(quality, np.float64)
        topk_stable(worth, 0, rng.keys)  # a row without a finite difficulty is named
        check_finite(x)
        by_key = np.argsort(rng.keys, kind="stable")
        worth = (worth - worth.min())[by_key]
        graph = undirected(*neighbours(Rows(x, order=by_key), self.neighbours))
        message = _passed()(graph.start, graph.other, graph.cosine, self.gamma_forward, worth)
        order, taken = _picks(message, graph, self.gamma_reverse, k)
        return Picked(by_key[order], evidence={"message": taken})


@lru_cache(maxsize=1)
def _passed() -> Any:
    """q_i + Σ_j exp(-γ d_ij) q_j, without room for the weights of all edges."""
    import numba

    @numba.njit(parallel=True, nogil=True, cache=True)
    def passed(start: Any, other: Any, cosine: Any, gamma: float, worth: Any) -> Any:  # pragma: no cover - compiled
        out = np.empty(len(worth))
        for i in numba.prange(len(worth)):
            total = worth[i]
            for e in range(start[i], start[i + 1]):
                total += np.exp(-gamma * (2 - 2 * float(cosine[e]))) * worth[other[e]]
            out[i] = total
        return out

    return passed


def _picks(message: np.ndarray, graph: Graph, gamma: float, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows in the order picked, of equal messages (in float32) the first, and the message of each."""
    message, free = message.copy(), np.ones(len(message), bool)
    queue = Queue(message.astype(np.float32), np.arange(len(message)), np.arange(len(message)))
    order, taken = np.empty(k, np.int64), np.empty(k)
    for i in range(k):
        value, _, row = queue.pop()
        while not free[row] or value != -np.float32(message[row]):  # an entry from before a change
            value, _, row = queue.pop()
        order[i], taken[i], free[row] = row, message[row], False
        theirs, cosine = graph[row]
        message[theirs] -= np.exp(-gamma * (2 - 2 * cosine.astype(np.float64))) * message[row]
        theirs = theirs[free[theirs]]
        for bound, one in zip((-message[theirs].astype(np.float32)).tolist(), theirs.tolist(), strict=True):
            queue.push((bound, one, one))
    return order, taken
