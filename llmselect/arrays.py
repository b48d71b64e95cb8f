"""Arrays in a feature store: read from memory maps in slices, gathers and blocks, never held whole."""

from __future__ import annotations

# scipy has no types.
# pyright: reportMissingTypeStubs=false
import hashlib
import json
import mmap
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmselect.errors import LlmselectError

if TYPE_CHECKING:
    from llmselect.store import Feature

_DTYPES = {"F16": np.float16, "F32": np.float32, "F64": np.float64, "I8": np.int8, "I32": np.int32, "I64": np.int64,
           "U8": np.uint8, "BOOL": np.bool_}  # fmt: skip


def digest_ids(ids: Sequence[str]) -> np.ndarray:
    """Row ids as `[n, 16]` bytes: hex content ids as they are, any other id by a 16-byte BLAKE2b digest."""
    out = bytearray()
    for one in ids:
        hexadecimal = len(one) == 32 and not one.strip("0123456789abcdef")
        out += bytes.fromhex(one) if hexadecimal else hashlib.blake2b(one.encode(), digest_size=16).digest()
    return np.frombuffer(bytes(out), np.uint8).reshape(-1, 16)


def fold_ids(raw: np.ndarray) -> np.ndarray:
    """`[n]` uint64 of `[n, 16]` bytes: the key of a row's random draws and of tie-breaks. All 16 bytes count."""
    high, low = np.ascontiguousarray(raw).view(">u8").astype(np.uint64).reshape(-1, 2).T
    return high ^ (low * np.uint64(0x9E3779B97F4A7C15))


class Ids(Sequence[str]):
    """The ids of a feature's rows, read from the memory map: 16 bytes a row, none of them Python strings until asked."""

    def __init__(self, raw: np.ndarray):
        self.raw = raw

    def __len__(self) -> int:
        return len(self.raw)

    def __getitem__(self, row: Any) -> Any:
        if isinstance(row, int | np.integer):
            return self.raw[row].tobytes().hex()
        return [one.tobytes().hex() for one in self.raw[row]]


def read_shard(path: Path) -> dict[str, np.ndarray]:
    """The arrays of one safetensors file, read-only and all in one memory map.

    Not `numpy.memmap`, which resolves its path every time, nor a file object: scattered rows lie in thousands of files, and are
    read again and again.
    """
    file = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    try:
        whole = mmap.mmap(file, 0, access=mmap.ACCESS_READ)
    finally:
        os.close(file)
    start = 8 + int.from_bytes(whole[:8], "little")
    return {name: np.ndarray(shape, dtype, whole, start + at) for name, dtype, shape, at in _layout(whole[8:start])}


@lru_cache(maxsize=16)
def _layout(header: bytes) -> list[tuple[str, np.dtype, tuple[int, ...], int]]:
    """Name, dtype, shape and first byte of each array: the same for all full shards of a dense feature."""
    entries = ((name, entry) for name, entry in json.loads(header).items() if name != "__metadata__")
    return [(name, np.dtype(_DTYPES[e["dtype"]]), tuple(e["shape"]), e["data_offsets"][0]) for name, e in entries]


@dataclass(frozen=True, eq=False)
class Csr:
    """Rows of a sparse `[n, width]` matrix: row i has `data[indptr[i]:indptr[i+1]]` in columns `indices[…]`, ascending."""

    indptr: np.ndarray
    indices: np.ndarray
    data: np.ndarray
    width: int

    def __len__(self) -> int:
        return len(self.indptr) - 1

    @classmethod
    def of_rows(cls, rows: Sequence[tuple[np.ndarray, np.ndarray]], width: int, dtype: Any) -> Csr:
        """From one (columns, values) pair per row."""
        indptr = np.concatenate([[0], np.cumsum([len(columns) for columns, _ in rows], dtype=np.int64)])
        columns = np.concatenate([np.zeros(0, np.int32), *(c for c, _ in rows)]).astype(np.int32)
        return cls(indptr.astype(np.int64), columns, np.concatenate([np.zeros(0), *(v for _, v in rows)]).astype(dtype), width)

    def row(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Columns and values of one row."""
        part = slice(int(self.indptr[i]), int(self.indptr[i + 1]))
        return self.indices[part], self.data[part]

    def scipy(self) -> Any:
        """As a float32 `scipy.sparse.csr_array`, which has no 16-bit values."""
        from scipy.sparse import csr_array

        return csr_array((self.data.astype(np.float32), self.indices, self.indptr), shape=(len(self), self.width))


def not_finite(array: Any) -> np.ndarray:
    """The rows of a dense or sparse array that hold a NaN or an infinity, ascending."""
    if isinstance(array, Csr):
        bad = np.flatnonzero(~np.isfinite(array.data))
        return np.unique(np.searchsorted(array.indptr, bad, side="right") - 1)
    if array.dtype.kind != "f":
        return np.zeros(0, np.int64)
    return np.flatnonzero(~np.isfinite(array).reshape(len(array), -1).all(1))


class Stored:
    """What arrays in a store share: their feature, the ids of its rows, and memory maps, a few at a time."""

    feature: Feature
    name: str
    ids: Ids
    shape: tuple[int, ...]
    dtype: np.dtype
    ndim: int
    open_shards = 32  # mapped pages count as memory of the process, so that all shards at once would be the whole pool

    def __init__(self, feature: Feature, name: str):
        if missing := feature.missing():
            raise LlmselectError(
                f"feature '{feature.folder.name}' is incomplete: {len(missing)} of {feature.shards} shards are "
                "missing; run the same extraction again to continue it"
            )
        self.feature, self.name, self.ids = feature, name, feature.ids
        self._maps: dict[int, dict[str, np.ndarray]] = {}
        self._verified: set[int] = set()

    def _shard(self, shard: int) -> dict[str, np.ndarray]:
        if shard not in self._verified:
            self.feature.verify(shard)
            self._verified.add(shard)
        if shard not in self._maps:
            while len(self._maps) >= self.open_shards:
                self._maps.pop(next(iter(self._maps)))
            try:
                self._maps[shard] = read_shard(self.feature.path(shard))
            except FileNotFoundError:
                self.feature.verify(shard)  # says what is lost, and what to do
                raise
        return self._maps[shard]

    def __len__(self) -> int:
        return self.feature.n

    @property
    def spec(self) -> dict[str, Any]:
        """What the feature was made from."""
        return dict(self.feature.spec)

    @cached_property
    def non_finite(self) -> np.ndarray:
        """Rows that were stored with a NaN or an infinity in this feature: selectors leave them out.

        In any of its arrays: integers hold no NaN, but the norm beside them does.
        """
        return np.unique(np.concatenate([np.zeros(0, np.int64), *self.feature.non_finite.values()]))

    def __getitem__(self, rows: Any) -> Any:
        raise NotImplementedError(f"{type(self).__name__} must define __getitem__")

    def _index(self, rows: Any) -> np.ndarray:
        """Any NumPy row index as row numbers."""
        index = np.arange(*rows.indices(len(self))) if isinstance(rows, slice) else np.asarray(rows)
        index = np.flatnonzero(index) if index.dtype == bool else index.astype(np.int64)
        if len(index) and not -len(self) <= index.min() <= index.max() < len(self):
            raise IndexError(f"row out of range for {len(self)} rows")
        return np.where(index < 0, index + len(self), index)

    def _places(self, index: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """(shard, positions in `index`, rows within the shard)."""
        size = self.feature.spec["shard_rows"]
        shard_of = index // size
        order = np.argsort(shard_of, kind="stable")  # once, not a search per shard: scattered rows lie in all of them
        shards, start = np.unique(shard_of[order], return_index=True)
        for shard, here in zip(shards.tolist(), np.split(order, start[1:]) if len(order) else [], strict=True):
            yield shard, here, index[here] - shard * size

    def blocks(self, rows: int = 8192) -> Iterator[tuple[int, Any]]:
        """`(start, block)` over all rows in order."""
        for start in range(0, len(self), rows):
            yield start, self[start : start + rows]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.feature.folder.name!r}, {self.name!r}, shape={self.shape}, dtype={self.dtype})"


class StoredArray(Stored):
    """An `[n, …]` array in a store: sliced, gathered or walked in blocks from the memory map, never held whole."""

    def __init__(self, feature: Feature, name: str):
        super().__init__(feature, name)
        first = self._shard(0)[name]
        self.shape: tuple[int, ...] = (feature.n, *first.shape[1:])
        self.dtype: np.dtype = first.dtype
        self.ndim: int = first.ndim

    def __getitem__(self, rows: Any) -> np.ndarray:
        if isinstance(rows, tuple):
            return self[rows[0]][(slice(None), *rows[1:])]
        if isinstance(rows, int | np.integer):
            return self[np.array([rows])][0]
        index = self._index(rows)
        out = np.empty((len(index), *self.shape[1:]), self.dtype)
        for shard, here, inside in self._places(index):
            out[here] = self._shard(shard)[self.name][inside]
        return out

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype)


class SparseArray(Stored):
    """A sparse `[n, width]` array in a store. Rows come as `scipy.sparse.csr_array`; `shards()` gives the raw maps."""

    width: int

    def __init__(self, feature: Feature, name: str):
        super().__init__(feature, name)
        dtype, (self.width,) = feature.spec["arrays"][name]
        self.shape: tuple[int, ...] = (feature.n, self.width)
        self.dtype: np.dtype = np.dtype(dtype.removeprefix("csr:"))
        self.ndim: int = 2

    def _csr(self, shard: int) -> Csr:
        raw = self._shard(shard)
        return Csr(raw[f"{self.name}.indptr"], raw[f"{self.name}.indices"], raw[f"{self.name}.data"], self.width)

    def shards(self) -> Iterator[tuple[int, Csr]]:
        """`(first row, Csr)` of each shard, memory-mapped."""
        for shard in range(self.feature.shards):
            yield self.feature.rows(shard).start, self._csr(shard)

    def __getitem__(self, rows: Any) -> Any:
        if isinstance(rows, int | np.integer):
            return self[np.array([rows])]
        found: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        for shard, here, inside in self._places(self._index(rows)):
            part = self._csr(shard)
            found |= {int(at): part.row(int(row)) for at, row in zip(here, inside, strict=True)}
        return Csr.of_rows([found[i] for i in range(len(found))], self.width, self.dtype).scipy()
