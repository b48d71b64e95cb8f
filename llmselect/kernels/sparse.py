"""Sparse rows that are asked for in any order, in rooms of `kernels.room`."""

from __future__ import annotations

# scipy has no types.
# pyright: reportMissingTypeStubs=false
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np

from llmselect.arrays import Csr
from llmselect.kernels.jaccard import sparse_blocks
from llmselect.kernels.room import room

TOGETHER = 1 << 24  # non-zeros of the rows multiplied at once


def gathered(x: Any) -> Csr:
    """What `kernels.jaccard.sparse_blocks` reads as one matrix, in float32: 8 bytes a non-zero, in files above a gigabyte."""
    indptr = np.zeros(x.shape[0] + 1, np.int64)
    for start, rows in sparse_blocks(x):
        indptr[start + 1 : start + len(rows) + 1] = np.diff(rows.indptr)
    np.cumsum(indptr, out=indptr)
    indices, data = (room((int(indptr[-1]),), kind) for kind in (np.int32, np.float32))
    for start, rows in sparse_blocks(x):
        here = slice(indptr[start], indptr[start + len(rows)])
        indices[here], data[here] = rows.indices, rows.data
    return Csr(indptr, indices, data, x.shape[1])


def products(x: Csr, rows: np.ndarray, vector: np.ndarray) -> np.ndarray:
    """⟨x_i, vector⟩ of each i in `rows`, in fp64."""
    out = np.empty(len(rows))
    _products()(x.indptr, x.indices, x.data, rows, vector, out)
    return out


def gram(x: Csr) -> Any:
    """Σ_i x_i x_iᵀ, `[width, width]` in fp64, sparse: as many numbers as there are pairs of columns that occur together."""
    from scipy.sparse import csr_array

    total: Any = csr_array((x.width, x.width))
    ends: np.ndarray = np.unique(np.searchsorted(x.indptr, np.arange(0, int(x.indptr[-1]), TOGETHER)))
    for first, last in pairwise([*ends.tolist(), len(x)]):
        start, here = x.indptr[first : last + 1], slice(x.indptr[first], x.indptr[last])
        part = Csr(start - start[0], x.indices[here], x.data[here], x.width).scipy().astype(np.float64)
        total = total + part.T @ part
    return csr_array(total)


@lru_cache(maxsize=1)
def _products() -> Any:
    import numba

    @numba.njit(parallel=True, nogil=True, cache=True)
    def made(indptr: Any, indices: Any, data: Any, rows: Any, vector: Any, out: Any) -> None:  # pragma: no cover - compiled
        for i in numba.prange(len(rows)):
            total = 0.0
            for j in range(indptr[rows[i]], indptr[rows[i] + 1]):
                total += data[j] * vector[indices[j]]
            out[i] = total

    return made
