"""Room for arrays as long as the pool: in memory while they are small, else mapped from a temporary file."""

from __future__ import annotations

import math
import tempfile
from typing import Any

import numpy as np

HELD = 1 << 30  # bytes above which an array lies in a file
WRITTEN = 1 << 24


def room(shape: tuple[int, ...], dtype: Any, held: int | None = None) -> np.ndarray:
    """An array to be filled: its numbers are not set. Above `held` bytes (1 GB) it lies in a file in `tempfile.gettempdir()`
    (`TMPDIR`), which has no name and goes with the array, however the process ends.

    Fill it in order: a page of a file that is written here and there goes to the disk again and again.

    Errors: `OSError` when the disk is full.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if size <= (HELD if held is None else held):
        return np.empty(shape, dtype)
    with tempfile.TemporaryFile(prefix="llmselect-") as file:
        for first in range(0, size, WRITTEN):  # before it is mapped: a full disk is then an error and not a signal
            file.write(bytes(min(WRITTEN, size - first)))
        file.flush()
        return np.asarray(np.memmap(file, dtype, "r+", shape=shape))
