"""The graph of nearest neighbours by cosine, from FAISS."""

from __future__ import annotations

# threadpoolctl has no types.
# pyright: reportMissingTypeStubs=false
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from llmselect.kernels.half import narrow
from llmselect.kernels.kmeans import ENOUGH, centroids_of, faiss
from llmselect.kernels.room import room
from llmselect.kernels.rows import BLOCK, Rows

EXACT = 50_000
NUMBERS = 1 << 23  # of rows multiplied with others, 32 MB in float32
LISTS, READ, ITERATIONS = 4, 36, 6  # lists for each √n, those read for a row, and rounds of k-means that make them
VECTORS = 1 << 28  # numbers of vectors put in the order of their lists at once, 512 MB
THREADS = 16  # at most: each holds about 150 MB

Found = tuple[np.ndarray, np.ndarray, np.ndarray]  # rows [b]; cosines [b, count] and rows [b, count] of the nearest, best first


def neighbours(x: Rows, k: int, exact_below: int = EXACT) -> tuple[np.ndarray, np.ndarray]:
    """The `k` nearest other rows of every row of unit rows `x [n, d]`: rows `[n, k]` int32, cosines `[n, k]` float32.

    Exact up to `exact_below` rows; above it rows are put into 4√n lists around centroids, of which 36 are read for each row
    (recall 0.98 on texts by TF-IDF, 1 where rows cluster). Vectors are taken in half precision, 2·n·d bytes; they, the lists
    of each row and what is found lie in rooms of `kernels.room`. -1, and cosine 0, where the lists hold fewer rows.
    """
    n, k = len(x), max(min(k, len(x) - 1), 0)
    near, cosine = room((n, k), np.int32), room((n, k), np.float32)
    if k < 1:
        return near, cosine
    small = n <= exact_below and n * x.shape[1] < 1 << 26
    found = _flat(x, k + 1) if small else _lists(x, 1 if n <= exact_below else int(LISTS * np.sqrt(n))).search(k + 1)
    order, at = np.empty(n, np.int64), 0
    for rows, values, others in found:
        here, at = slice(at, at + len(rows)), at + len(rows)
        own = others == rows[:, None]
        own[~own.any(1), -1] = True  # among equal rows the row itself may be missing: the last one goes then
        order[here], near[here] = rows, others[~own].reshape(len(rows), k)
        cosine[here] = np.where(others < 0, 0, values)[~own].reshape(len(rows), k)
    place = np.argsort(order)
    return (near, cosine) if small else (_taken(near, place), _taken(cosine, place))


def _taken(found: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """`found[rows]`."""
    out = room(found.shape, found.dtype)
    for first in range(0, len(out), BLOCK):
        out[first : first + BLOCK] = found[rows[first : first + BLOCK]]
    return out


def _flat(x: Rows, count: int) -> Iterator[Found]:
    index = faiss().IndexFlatIP(x.shape[1])
    for _, rows in x.blocks():
        index.add(np.ascontiguousarray(rows, np.float32))
    for start, rows in x.blocks():
        values, near = index.search(np.ascontiguousarray(rows, np.float32), count)
        yield np.arange(start, start + len(rows)), values, near


@dataclass(frozen=True, eq=False)
class _Lists:
    """Rows list by list: their numbers `order [n]`, vectors `[n, d]` and the lists read for each `read [n, r]`, all in that
    order, and `start [lists + 1]`."""

    order: np.ndarray
    vectors: np.ndarray
    read: np.ndarray
    start: list[int]

    def search(self, count: int) -> Iterator[Found]:
        """The `count` nearest rows of every row, itself among them, in the lists that are read for it."""
        library, n = faiss(), len(self.order)
        size = min(max(n // 16, 8192), 1 << 17)
        # A product is rounded in another way on every number of threads: each part has one, and threads share the parts.
        threads: int = min(THREADS, library.omp_get_max_threads())
        with threadpool_limits(1), ThreadPoolExecutor(threads, "neighbours", library.omp_set_num_threads, (1,)) as pool:
            yield from pool.map(partial(self._part, count), range(0, n, size), [size] * len(range(0, n, size)))

    def _part(self, count: int, first: int, size: int) -> Found:
        """Of rows `first` to `first + size`, a list at a time, multiplied with all rows that it is read for: to compare them
        one by one takes ten times as long."""
        read = self.read[first : first + size]
        best = faiss().ResultHeap(len(read), count, keep_max=True)
        asking = np.argsort(read, axis=None, kind="stable") // read.shape[1]
        ends = np.cumsum(np.bincount(read.ravel(), minlength=len(self.start) - 1)).tolist()
        for one, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)):
            self._compare(best, asking[begin:end], first, one)
        best.finalize()
        return self.order[first : first + size], best.D, np.where(best.I < 0, -1, self.order[best.I])

    def _compare(self, best: Any, asking: np.ndarray, first: int, one: int) -> None:
        most = max(64, min(2048, NUMBERS // self.vectors.shape[1]))  # on each side, 16 MB of cosines
        for begin in range(self.start[one], self.start[one + 1], most):
            others = np.arange(begin, min(begin + most, self.start[one + 1]))
            block = self._vectors(slice(begin, begin + len(others)))
            for at in range(0, len(asking), most):
                rows = asking[at : at + most]
                best.add_result_subset(rows, self._vectors(first + rows) @ block.T, others)

    def _vectors(self, rows: Any) -> np.ndarray:
        found = self.vectors[rows]
        return narrow(found, np.empty(found.shape, np.float32))


def _lists(x: Rows, lists: int) -> _Lists:
    """The rows of `x` in `lists` lists."""
    nearest = _nearest_lists(x, lists) if lists > 1 else np.zeros((len(x), 1), np.int32)
    order, vectors = np.argsort(nearest[:, 0], kind="stable"), room(x.shape, np.float16)
    together = max(BLOCK, VECTORS // x.shape[1])
    for first in range(0, len(x), together):
        vectors[first : first + together] = x.gather(order[first : first + together], np.float16)
    start = np.cumsum(np.bincount(nearest[:, 0], minlength=lists))
    return _Lists(order, vectors, _taken(nearest, order), [0, *start.tolist()])


def _nearest_lists(x: Rows, lists: int) -> np.ndarray:
    """`[n, r]`: the lists whose centroids are nearest to each row; the first is its own."""
    sample = np.random.default_rng(0).permutation(len(x))[: ENOUGH * lists]
    index = faiss().IndexFlatIP(x.shape[1])
    index.add(centroids_of(x.gather(sample, np.float32), lists, ITERATIONS, True))
    found = room((len(x), min(READ, lists)), np.int32)
    for first, rows in x.blocks():
        found[first : first + len(rows)] = index.search(np.ascontiguousarray(rows, np.float32), found.shape[1])[1]
    return found
