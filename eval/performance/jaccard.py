"""Scoring a million sparse rows against ten prototypes, as a ratio to reading the same bytes from memory.

    python eval/performance/jaccard.py [--rows 1000000] [--nonzeros 192] [--width 16384] [--prototypes 10] [--repeats 5]

Blocks of 8,192 synthetic rows as a store would give them. Reading: one sum over the bytes of indices and values as
64-bit words, of the same block, just before.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import numba
import numpy as np

from llmselect.arrays import Csr
from llmselect.kernels.jaccard import jaccard

BLOCK = 8192


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rows", 1_000_000), ("nonzeros", 192), ("width", 16_384), ("prototypes", 10), ("repeats", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    rng = np.random.default_rng(0)
    prototypes = np.where(rng.random((a.prototypes, a.width)) < 0.1, rng.random((a.prototypes, a.width)), 0)
    total = a.rows * a.nonzeros
    indices = np.empty(total, np.int32)
    for start in range(0, total, BLOCK * a.nonzeros):
        part = indices[start : start + BLOCK * a.nonzeros]
        part[:] = np.sort(rng.integers(0, a.width, (len(part) // a.nonzeros, a.nonzeros)), axis=1).ravel()
    values = np.tile(rng.random(1 << 20).astype(np.float16), -(-total // (1 << 20)))[:total]
    blocks = [slice(i * a.nonzeros, min(total, (i + BLOCK) * a.nonzeros)) for i in range(0, a.rows, BLOCK)]
    ratios, seconds = [], []
    score(indices, values, blocks[:1], prototypes, a)
    for _ in range(a.repeats):
        read = timed(lambda: [indices[b].view(np.int64).sum() + values[b].view(np.int64).sum() for b in blocks])
        took = timed(lambda: score(indices, values, blocks, prototypes, a))
        ratios.append(took / read)
        seconds.append(took)
    found = {"rows": a.rows, "nonzeros": a.nonzeros, "width": a.width, "prototypes": a.prototypes, "repeats": a.repeats,
             "threads": numba.get_num_threads(), "gigabytes": round(total * 6 / 1e9, 3),
             "ratio_to_reading": {"median": round(statistics.median(ratios), 2), "min": round(min(ratios), 2),
                                  "max": round(max(ratios), 2)}, "seconds": round(statistics.median(seconds), 2)}  # fmt: skip
    print(json.dumps(found, indent=2))
    if a.out:
        a.out.write_text(json.dumps(found, indent=2) + "\n")


def score(indices: np.ndarray, values: np.ndarray, blocks: list[slice], prototypes: np.ndarray, a: argparse.Namespace) -> None:
    """One pass over all rows."""
    for b in blocks:
        indptr = np.arange(0, b.stop - b.start + 1, a.nonzeros, dtype=np.int64)
        jaccard(Csr(indptr, indices[b], values[b], a.width), prototypes)


def timed(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
