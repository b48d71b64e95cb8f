"""Arrays whose rows are computed when they are first read, and kept: for methods that exist to avoid computing them all.

Layout::

    <store>/lazy/<feature>/spec.json, ids.safetensors     as of a whole feature
    <store>/lazy/<feature>/000007.npy                     the rows of the eighth request that no earlier one had
    <store>/lazy/<feature>/000007-0002.safetensors        part 2 of them, and 000007-0002.json, its checksum

Parts are cut by the request alone, whatever the number of processes. A killed run first finishes the request it was in, with
the same parts; so every row is computed among the same others, and a method that asks again gets the same bytes.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from llmselect import atomic
from llmselect.arrays import Ids, read_shard
from llmselect.errors import LlmselectError

PART = 256
Compute = Callable[[np.ndarray], Mapping[str, np.ndarray]]


class LazyArray:
    """An `[n, …]` array of a feature: `array[rows]` computes the rows that nobody has asked for yet and reads the others.

    Args:
        folder: of the feature, `<store>/lazy/<feature>`.
        name, tail: the array, and the shape of one row of it.
        compute: rows `[r]`, ascending → array name → `[r, …]`.
        rank, world, barrier: this process among those that make the same requests in the same order.
    """

    lazy = True
    folder: Path
    name: str
    ids: Ids
    shape: tuple[int, ...]
    dtype: np.dtype
    ndim: int
    compute: Compute
    part: int
    rank: int
    world: int
    barrier: Callable[[], None]
    place: np.ndarray  # where a row is in `values`; -1: not computed yet
    values: np.ndarray
    requests: int

    def __init__(self, folder: Path, name: str, tail: tuple[int, ...], ids: Ids, compute: Compute, *, part: int = PART,
                 rank: int = 0, world: int = 1, barrier: Callable[[], None] = lambda: None):  # fmt: skip
        self.folder, self.name, self.ids, self.compute, self.part = folder, name, ids, compute, part
        self.rank, self.world, self.barrier = rank, world, barrier
        self.shape, self.dtype, self.ndim = (len(ids), *tail), np.dtype(np.float32), 1 + len(tail)
        self.place = np.full(len(ids), -1, np.int32)
        self.values = np.zeros((0, *tail), np.float32)
        self.requests = 0
        for file in sorted(folder.glob("[0-9]*[0-9].npy")):
            self._take(self._request(file))

    def _request(self, file: Path) -> np.ndarray:
        """The rows of an earlier request: ascending, of this feature, not asked for before."""
        rows = np.zeros(0, np.int64)
        try:
            rows = np.load(file, allow_pickle=False)
            good = rows.ndim == 1 and rows.dtype == np.int64 and len(rows) and 0 <= rows[0] <= rows[-1] < len(self)
            good = good and bool((np.diff(rows) > 0).all()) and not (self.place[rows] >= 0).any()
        except Exception:  # NumPy parses the header as Python: a changed byte raises what a tokenizer likes
            good = False
        if not good:
            raise LlmselectError(f"{file} is damaged (no request of rows); delete {self.folder} and run again")
        return rows

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def spec(self) -> dict[str, Any]:
        """What the feature was made from."""
        return atomic.read_sealed(self.folder / "spec.json", f"delete {self.folder} and run again")

    @property
    def computed(self) -> int:
        """Rows computed so far."""
        return int((self.place >= 0).sum())

    def __getitem__(self, rows: Any) -> np.ndarray:
        if isinstance(rows, int | np.integer):
            return self[np.array([rows])][0]
        index = np.arange(*rows.indices(len(self))) if isinstance(rows, slice) else np.asarray(rows)
        index = np.flatnonzero(index) if index.dtype == bool else index.astype(np.int64)
        if len(index) and not 0 <= index.min() <= index.max() < len(self):
            raise IndexError(f"row out of range for {len(self)} rows")
        new = np.unique(index[self.place[index] < 0])
        if len(new):
            if self.rank == 0:
                buffer = io.BytesIO()
                np.save(buffer, new, allow_pickle=False)
                atomic.write_bytes(self.folder / f"{self.requests:06d}.npy", buffer.getvalue())
            self._take(new)
        return self.values[self.place[index]]

    def _take(self, rows: np.ndarray) -> None:
        """Compute what is missing of one request, and read it."""
        from safetensors.numpy import save

        starts = range(0, len(rows), self.part)
        files = [self.folder / f"{self.requests:06d}-{i:04d}.safetensors" for i in range(len(starts))]
        for i, (start, file) in enumerate(zip(starts, files, strict=True)):
            asked = hashlib.sha256(np.ascontiguousarray(rows[start : start + self.part]).tobytes()).hexdigest()
            if file.with_suffix(".json").exists():
                if self._about(file).get("rows", asked) != asked:
                    raise LlmselectError(f"{file} holds other rows than were asked for: the request beside it is damaged; "
                                         f"delete {self.folder} and run again")  # fmt: skip
                continue
            if i % self.world != self.rank:
                continue
            made = self.compute(rows[start : start + self.part])
            data = save({name: np.ascontiguousarray(value) for name, value in made.items()})
            atomic.write_bytes(file, data)
            atomic.write_sealed(file.with_suffix(".json"), {"sha256": hashlib.sha256(data).hexdigest(), "rows": asked})
        self.barrier()
        self.place[rows] = np.arange(len(self.values), len(self.values) + len(rows))
        self.values = np.concatenate([self.values, *(self._read(file) for file in files)])
        self.requests += 1

    def _about(self, file: Path) -> dict[str, Any]:
        note = file.with_suffix(".json")
        return atomic.read_sealed(note, f"delete {note} and run again")

    def _read(self, file: Path) -> np.ndarray:
        known = self._about(file)["sha256"]
        if not file.exists() or atomic.sha256_file(file) != known:
            raise LlmselectError(f"{file} is damaged (its checksum differs); delete {file.with_suffix('.json')} and run again")
        return np.asarray(read_shard(file)[self.name], np.float32)

    def __repr__(self) -> str:
        return f"LazyArray({self.folder.name!r}, {self.name!r}, shape={self.shape}, computed={self.computed})"
