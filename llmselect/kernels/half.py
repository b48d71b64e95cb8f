"""Half precision as float32, on one thread and without torch, which NumPy does a number at a time."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

ENOUGH = 1 << 16  # numbers below which numba, whose import takes a second, is not worth it


def narrow(part: np.ndarray, out: np.ndarray) -> np.ndarray:
    """`out [b, d]` in float32 with the numbers of `part [b, d]`, exactly where these are in half precision."""
    if part.dtype != np.float16 or out.size < ENOUGH:
        out[:] = part
    else:
        _widened()(np.ascontiguousarray(part).view(np.uint16), out.view(np.uint32), out)
    return out


@lru_cache(maxsize=1)
def _widened() -> Any:
    import numba

    @numba.njit(nogil=True, cache=True)
    def made(half: Any, bits: Any, out: Any) -> None:  # pragma: no cover - compiled
        """Exponent and fraction in their places in float32, times 2^112 for its larger bias, also where there is no leading one;
        then the sign, and infinities and what is no number with an exponent of ones. `bits` are those of `out`."""
        for i in range(len(half)):
            for j in range(half.shape[1]):
                bits[i, j] = (np.uint32(half[i, j]) & np.uint32(0x7FFF)) << np.uint32(13)
            for j in range(half.shape[1]):
                out[i, j] *= np.float32(2.0**112)
            for j in range(half.shape[1]):
                one = np.uint32(half[i, j])
                special = np.uint32(0x7F800000) if one & np.uint32(0x7C00) == np.uint32(0x7C00) else np.uint32(0)
                bits[i, j] |= special | (one & np.uint32(0x8000)) << np.uint32(16)

    return made
