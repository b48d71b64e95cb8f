"""The graph of nearest neighbours by cosine, from FAISS."""

from __future__ import annotations

from typing import Any

import numpy as np

from llmselect.kernels.kmeans import faiss
from llmselect.kernels.rows import Rows

EXACT = 50_000


class ByKey:
    """The rows of an array-like in the order of their keys: among equal rows the index of FAISS keeps the first."""

    def __init__(self, x: Any, keys: np.ndarray):
        self.x, self.order, self.shape = x, np.argsort(keys, kind="stable"), x.shape

    def __getitem__(self, rows: Any) -> Any:
        return self.x[self.order[rows]]


def neighbours(x: Rows, k: int, exact_below: int = EXACT) -> tuple[np.ndarray, np.ndarray]:
    """The `k` nearest other rows of every row of unit rows `x [n, d]`: rows `[n, k]` int32, cosines `[n, k]` float32.

    Exact up to `exact_below` rows; above it an inverted file of 4√n lists of which 32 are read (recall about 0.99 where
    rows cluster). FAISS holds the vectors in half precision: 2·n·d bytes. -1 where there are fewer rows.
    """
    library, (n, d) = faiss(), x.shape
    k = min(k, n - 1)
    kind = library.ScalarQuantizer.QT_fp16
    if n <= exact_below:
        index = library.IndexFlatIP(d) if n * d < 1 << 26 else library.IndexScalarQuantizer(d, kind, library.METRIC_INNER_PRODUCT)
    else:
        lists = int(4 * np.sqrt(n))
        coarse = library.IndexFlatIP(d)
        index = library.IndexIVFScalarQuantizer(coarse, d, lists, kind, library.METRIC_INNER_PRODUCT, False)
        index.nprobe = 32
    if not index.is_trained:
        rows = np.random.default_rng(0).permutation(n)[: min(n, 64 * int(4 * np.sqrt(n)))]
        index.train(x.gather(rows).astype(np.float32))
    for _, rows in x.blocks():
        index.add(np.ascontiguousarray(rows, np.float32))
    found, cosine = np.full((n, max(k, 0)), -1, np.int32), np.zeros((n, max(k, 0)), np.float32)
    if k < 1:
        return found, cosine
    for start, rows in x.blocks():
        values, near = index.search(np.ascontiguousarray(rows, np.float32), k + 1)
        own = near == np.arange(start, start + len(rows))[:, None]
        own[~own.any(1), -1] = True  # among equal rows the row itself may be missing: the last one goes then
        found[start : start + len(rows)] = near[~own].reshape(len(rows), k)
        cosine[start : start + len(rows)] = values[~own].reshape(len(rows), k)
    return found, cosine
