"""The graph of nearest neighbours by cosine, from FAISS."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from llmselect.kernels.kmeans import faiss
from llmselect.kernels.rows import Rows

EXACT = 50_000
HELD = 1 << 30  # bytes of vectors above which FAISS keeps them in a file


class ByKey:
    """The rows of an array-like in the order of their keys: among equal rows the index of FAISS keeps the first."""

    def __init__(self, x: Any, keys: np.ndarray):
        self.x, self.order, self.shape = x, np.argsort(keys, kind="stable"), x.shape

    def __getitem__(self, rows: Any) -> Any:
        return self.x[self.order[rows]]


def neighbours(x: Rows, k: int, exact_below: int = EXACT) -> tuple[np.ndarray, np.ndarray]:
    """The `k` nearest other rows of every row of unit rows `x [n, d]`: rows `[n, k]` int32, cosines `[n, k]` float32.

    Exact up to `exact_below` rows; above it an inverted file of 4√n lists of which 32 are read (recall about 0.99 where
    rows cluster). FAISS takes the vectors in half precision, 2·n·d bytes: in memory up to 1 GB, else in a temporary file.
    -1 where there are fewer rows.
    """
    n, k = len(x), min(k, len(x) - 1)
    found, cosine = np.full((n, max(k, 0)), -1, np.int32), np.zeros((n, max(k, 0)), np.float32)
    if k < 1:
        return found, cosine
    with ExitStack() as held:
        index = _index(x, exact_below, held)
        for _, rows in x.blocks():
            index.add(np.ascontiguousarray(rows, np.float32))
        for start, rows in x.blocks():
            values, near = index.search(np.ascontiguousarray(rows, np.float32), k + 1)
            own = near == np.arange(start, start + len(rows))[:, None]
            own[~own.any(1), -1] = True  # among equal rows the row itself may be missing: the last one goes then
            found[start : start + len(rows)] = near[~own].reshape(len(rows), k)
            cosine[start : start + len(rows)] = values[~own].reshape(len(rows), k)
        del index  # before the file that it maps goes
    return found, cosine


def _index(x: Rows, exact_below: int, held: ExitStack) -> Any:
    """An empty index for the rows of `x`, trained; its file, if it needs one, lives as long as `held`."""
    library, (n, d) = faiss(), x.shape
    kind, lists = library.ScalarQuantizer.QT_fp16, int(4 * np.sqrt(n))
    if n <= exact_below:
        if n * d < 1 << 26:
            return library.IndexFlatIP(d)
        return library.IndexScalarQuantizer(d, kind, library.METRIC_INNER_PRODUCT)
    index = library.IndexIVFScalarQuantizer(library.IndexFlatIP(d), d, lists, kind, library.METRIC_INNER_PRODUCT, False)
    index.nprobe = 32
    rows = np.random.default_rng(0).permutation(n)[: min(n, 64 * lists)]
    index.train(x.gather(rows, np.float32))
    if 2 * n * d > HELD:
        folder = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="llmselect-neighbours-")))
        filed = library.OnDiskInvertedLists(index.nlist, index.code_size, str(folder / "lists"))
        index.replace_invlists(filed, True)
        filed.this.disown()  # the index frees it, not Python
    return index
