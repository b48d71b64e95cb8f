"""Synthetic features that the benchmarks of selectors share."""

from __future__ import annotations

from pathlib import Path

import numpy as np

BLOCK = 8192


def write_directions(path: Path, rows: int, dim: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """Rows of float16 around `count` random directions, written to `path` in blocks; returns the directions `[count, dim]`."""
    directions = rng.standard_normal((count, dim)).astype(np.float32)
    x = np.lib.format.open_memmap(path, "w+", np.float16, (rows, dim))
    for start in range(0, rows, BLOCK):
        size = min(BLOCK, rows - start)
        x[start : start + size] = directions[rng.integers(0, count, size)] + rng.standard_normal((size, dim), np.float32)
    x.flush()
    return directions
