"""Counter-based randomness: a row's draw depends on (seed, stream, row id) alone, never on order or sharding."""

from __future__ import annotations

# An array of any type that is asked for its type.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmselect.arrays import Ids, digest_ids, fold_ids


def _mix(x: np.ndarray) -> np.ndarray:
    """The SplitMix64 finaliser (Steele, Lea, Flood 2014): a bijection of 64-bit words with full avalanche."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def keys_of(ids: Any, n: int) -> np.ndarray:
    """`[n]` uint64 keys of rows: folded from their ids (the same from a list as from a store), else the row number."""
    if ids is None:
        return np.arange(n, dtype=np.uint64)
    if isinstance(ids, np.ndarray) and ids.dtype == np.uint64:
        return ids
    return fold_ids(ids.raw if isinstance(ids, Ids) else digest_ids([str(one) for one in ids]))


@dataclass(frozen=True, eq=False)
class Keyed:
    """The random source handed to selectors: `keys [n]` uint64 and a seed."""

    seed: int
    keys: np.ndarray

    def _base(self, stream: str) -> np.uint64:
        text = f"{self.seed}/{stream}".encode()
        return np.uint64(int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big"))

    def uniform(self, stream: str = "") -> np.ndarray:
        """`[n]` float64 in (0, 1), one draw per row."""
        with np.errstate(over="ignore"):
            bits = _mix(_mix(self.keys + np.uint64(0x9E3779B97F4A7C15)) ^ self._base(stream))
        return ((bits >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52

    def generator(self, stream: str = "") -> np.random.Generator:
        """A NumPy generator for draws that belong to no row."""
        return np.random.Generator(np.random.Philox(key=int(self._base(stream))))
