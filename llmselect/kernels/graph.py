"""Graphs of nearest neighbours, undirected or turned round, in rooms of `kernels.room`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from llmselect.kernels.room import room

TOGETHER = 1 << 26  # edges filled at once, 512 MB


@dataclass(frozen=True, eq=False)
class Graph:
    """The neighbours of row i are `other[start[i] : start[i + 1]]` (int32), their cosines `cosine[…]` (float32, at most 1).

    Memory: 8 bytes an edge and direction, in files where that is more than a gigabyte, and 8 bytes a row.
    """

    start: np.ndarray
    other: np.ndarray
    cosine: np.ndarray

    def __getitem__(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        at = slice(self.start[row], self.start[row + 1])
        return self.other[at], self.cosine[at]


class Into(NamedTuple):
    """The edges into row u: from rows `source[start[u] : start[u + 1]]` (int32, ascending), each with its `chance`."""

    start: np.ndarray
    source: np.ndarray
    chance: np.ndarray


def into(near: np.ndarray, chance: np.ndarray) -> Into:
    """The edges of each row to those near it, `[n, c]`, at the rows that they lead to; without those of no chance."""
    degree, (led, leading) = np.zeros(len(near), np.int64), _led()
    led(near, chance, degree)
    start = np.concatenate([[0], np.cumsum(degree)])
    made = Into(start, room((int(start[-1]),), np.int32), room((int(start[-1]),), chance.dtype))
    for first, last, source, value in _parts(start, chance.dtype):
        here = slice(start[first], start[last])
        leading(near, chance, first, start[first:last] - start[first], source, value)
        made.source[here], made.chance[here] = source, value
    return made


def _parts(start: np.ndarray, dtype: Any) -> Iterator[tuple[int, int, np.ndarray, np.ndarray]]:
    """`(first row, last, room for the rows at the other end, and for their values)`: in order, so that files are filled so."""
    ends: np.ndarray = np.unique(np.searchsorted(start, np.arange(0, int(start[-1]), TOGETHER)))
    for first, last in pairwise([*ends.tolist(), len(start) - 1]):
        edges = int(start[last] - start[first])
        yield first, last, np.empty(edges, np.int32), np.empty(edges, dtype)


def undirected(near: np.ndarray, cosine: np.ndarray, above: float = -np.inf) -> Graph:
    """Rows one of which is among the nearest of the other, from `kernels.neighbours`; those with a cosine `above` alone.

    A row's own come first, best first, then the rows that have it among theirs, ascending. The cosines of both directions may
    differ in their last bits, as products of different blocks do.
    """
    kind, degree, fill = room(near.shape, np.int8), np.empty(len(near), np.int64), _made()
    fill.kinds(near, cosine, above, kind, degree)
    fill.count(near, kind, degree)
    start = np.concatenate([[0], np.cumsum(degree)])
    graph = Graph(start, room((int(start[-1]),), np.int32), room((int(start[-1]),), np.float32))
    for first, last, other, value in _parts(start, np.float32):
        here = slice(start[first], start[last])
        fill.edges(near, cosine, kind, first, start[first:last] - start[first], other, value)
        graph.other[here], graph.cosine[here] = other, value
    return graph


@dataclass(frozen=True, eq=False)
class _Compiled:
    kinds: Any
    count: Any
    edges: Any


OWN, ONE_WAY = 1, 2  # a neighbour that has the row among its own too; one that has not


@lru_cache(maxsize=1)
def _made() -> _Compiled:
    import numba

    @numba.njit(parallel=True, nogil=True, cache=True)
    def kinds(near: Any, cosine: Any, above: float, kind: Any, degree: Any) -> None:  # pragma: no cover - compiled
        for i in numba.prange(len(near)):
            degree[i] = 0
            for p in range(near.shape[1]):
                j, kind[i, p] = near[i, p], 0
                if j >= 0 and cosine[i, p] > above:
                    kind[i, p], degree[i] = ONE_WAY, degree[i] + 1
                    for q in range(near.shape[1]):
                        if near[j, q] == i and cosine[j, q] > above:
                            kind[i, p] = OWN
                            break

    @numba.njit(nogil=True, cache=True)
    def count(near: Any, kind: Any, degree: Any) -> None:  # pragma: no cover - compiled
        for i in range(len(near)):
            for p in range(near.shape[1]):
                if kind[i, p] == ONE_WAY:
                    degree[near[i, p]] += 1

    @numba.njit(nogil=True, cache=True)
    def edges(near: Any, cosine: Any, kind: Any, first: int, at: Any, other: Any, value: Any) -> None:  # pragma: no cover
        """Those of rows `first` to `first + len(at)`, from all rows."""
        for i in range(first, first + len(at)):
            for p in range(near.shape[1]):
                if kind[i, p] > 0:
                    other[at[i - first]], value[at[i - first]] = near[i, p], min(cosine[i, p], 1)
                    at[i - first] += 1
        for i in range(len(near)):
            for p in range(near.shape[1]):
                j = near[i, p] - first
                if kind[i, p] == ONE_WAY and 0 <= j < len(at):
                    other[at[j]], value[at[j]] = i, min(cosine[i, p], 1)
                    at[j] += 1

    return _Compiled(kinds, count, edges)


@lru_cache(maxsize=1)
def _led() -> tuple[Any, Any]:
    import numba

    @numba.njit(nogil=True, cache=True)
    def led(near: Any, chance: Any, degree: Any) -> None:  # pragma: no cover - compiled
        for i in range(len(near)):
            for p in range(near.shape[1]):
                if chance[i, p] > 0:
                    degree[near[i, p]] += 1

    @numba.njit(nogil=True, cache=True)
    def leading(near: Any, chance: Any, first: int, at: Any, source: Any, value: Any) -> None:  # pragma: no cover - compiled
        """To rows `first` to `first + len(at)`."""
        for i in range(len(near)):
            for p in range(near.shape[1]):
                j = near[i, p] - first
                if chance[i, p] > 0 and 0 <= j < len(at):
                    source[at[j]], value[at[j]] = i, chance[i, p]
                    at[j] += 1

    return led, leading
