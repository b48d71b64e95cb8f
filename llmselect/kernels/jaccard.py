"""Generalised Jaccard similarity of sparse rows to a few dense prototypes, exactly and in one reading of the rows."""

from __future__ import annotations

# scipy.sparse has no types.
# pyright: reportMissingTypeStubs=false
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np

from llmselect.arrays import Csr
from llmselect.errors import LlmselectError

BLOCK = 8192


@lru_cache(maxsize=1)
def _kernel() -> Any:
    import numba

    @numba.njit(parallel=True, nogil=True, cache=True)
    def overlaps(indptr: Any, indices: Any, data: Any, prototypes: Any, overlap: Any, mass: Any) -> None:  # pragma: no cover
        for i in numba.prange(len(indptr) - 1):
            held = np.zeros(prototypes.shape[1])
            total = 0.0
            for j in range(indptr[i], indptr[i + 1]):
                value, theirs = data[j], prototypes[indices[j]]
                total += value
                for g in range(len(theirs)):
                    held[g] += value if value < theirs[g] else theirs[g]  # faster than min(), which asks for NaN
            mass[i] = total
            overlap[i] = held

    return overlaps


def jaccard(rows: Csr, prototypes: np.ndarray) -> np.ndarray:
    """`[b, G]` float32: J(z, p) = Σ_k min(z_k, p_k) / Σ_k max(z_k, p_k) of rows z ≥ 0 `[b, width]`, p ≥ 0 `[G, width]`.

    With m = Σ min over the support of z: J = m / (‖z‖₁ + ‖p‖₁ - m), so only the non-zeros are read. An empty row, or
    prototype, gives 0.
    """
    overlap, mass = np.empty((len(rows), len(prototypes))), np.empty(len(rows))
    table = np.ascontiguousarray(prototypes.T, dtype=np.float32)  # one latent's values of all prototypes lie together
    _kernel()(rows.indptr, rows.indices, rows.data.astype(np.float32), table, overlap, mass)
    union = mass[:, None] + table.sum(0, dtype=np.float64) - overlap
    return (overlap / np.where(union > 0, union, 1)).astype(np.float32)


def sparse_blocks(x: Any, block: int = BLOCK) -> Iterator[tuple[int, Csr]]:
    """`(first row, Csr)` over the rows of a sparse array of a store, a `scipy.sparse` matrix or a dense array `[n, width]`.

    Errors: `LlmselectError` naming rows with a value that is negative or not finite.
    """
    shards = x.shards() if hasattr(x, "shards") else ((i, _csr(x[i : i + block])) for i in range(0, x.shape[0], block))
    for start, rows in shards:
        wrong = np.flatnonzero(~((rows.data >= 0) & np.isfinite(rows.data)))
        if len(wrong):
            bad = start + np.unique(np.searchsorted(rows.indptr, wrong, side="right") - 1)
            raise LlmselectError(f"{len(bad)} rows are negative or not finite and cannot be ranked: rows {bad[:5].tolist()}")
        yield start, rows


def rows_of(x: Any, order: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Columns and values of the rows `order` of what `sparse_blocks` reads, a block at a time."""
    for start in range(0, len(order), BLOCK):
        rows = _csr(x[order[start : start + BLOCK]])
        yield from (rows.row(i) for i in range(len(rows)))


def _csr(part: Any) -> Csr:
    if not hasattr(part, "indptr"):
        from scipy.sparse import csr_array

        part = csr_array(np.asarray(part, np.float32))
    return Csr(part.indptr, part.indices, part.data, part.shape[1])
