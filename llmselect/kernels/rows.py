"""Rows of an array-like as the kernels want them: finite, unit length if asked for, narrow enough to square."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from llmselect.errors import LlmselectError
from llmselect.kernels.cosine import unit
from llmselect.kernels.half import narrow
from llmselect.kernels.sketch import generator, random_signs

BLOCK, RUN = 8192, 1024
HELD = 1 << 25  # numbers that `Held` keeps, 256 MB
AHEAD, MOST = 1 << 25, 1 << 20  # numbers and rows in another order read at once; two such parts live: 128 MB in half precision


class Rows:
    """An `[n, d]` array-like read in fp64, checked, optionally as unit rows and folded to `dim` columns.

    Folding is the sketch of `kernels.sketch`: E⟨Sx, Sy⟩ = ⟨x, y⟩, and nothing changes where d ≤ dim. A zero row stays zero.
    Row i is row `order[i]` of `x` where there is an `order`: by key, what is made of them does not depend on the pool's.
    Errors: `LlmselectError` naming rows that are not finite.
    """

    x: Any
    normalize: bool
    wide: int  # columns of x
    folded: bool
    shape: tuple[int, int]
    signs: np.ndarray
    turns: list[int]
    order: np.ndarray | None

    def __init__(self, x: Any, *, normalize: bool = True, dim: int | None = None, order: np.ndarray | None = None):
        self.x, self.normalize, self.wide, self.order = x, normalize, int(x.shape[1]), order
        self.folded = dim is not None and self.wide > dim
        n: int = x.shape[0] if order is None else len(order)
        self.shape = (int(n), int(dim) if self.folded and dim else self.wide)
        if self.folded:
            draw = generator(0, "columns", "fold")
            self.signs = random_signs(draw, self.wide)
            words = np.asarray(draw.bit_generator.random_raw(-(-self.wide // self.shape[1])), np.uint64)
            self.turns = [int(word) for word in words % np.uint64(self.shape[1])]

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> np.ndarray:
        if self.order is not None:
            rows = self.order[rows]
        return self._made(self.x[rows], rows)

    def _made(self, stored: Any, rows: Any) -> np.ndarray:
        """From `rows` of x as they are stored."""
        part = np.asarray(stored, np.float64)
        if not np.isfinite(part).all():
            index = np.arange(*rows.indices(self.x.shape[0])) if isinstance(rows, slice) else np.asarray(rows)
            bad = index[~np.isfinite(part).all(1)]
            raise LlmselectError(f"{len(bad)} rows have no finite value and cannot be ranked: rows {bad[:5].tolist()}")
        part = self._fold(part) if self.folded else part
        return unit(part) if self.normalize else part

    def _fold(self, part: np.ndarray) -> np.ndarray:
        out, dim = np.zeros((len(part), self.shape[1])), self.shape[1]
        for run, turn in enumerate(self.turns):
            at = slice(run * dim, min(self.wide, (run + 1) * dim))
            wide = np.zeros((len(part), dim))
            wide[:, : at.stop - at.start] = part[:, at] * self.signs[at]
            out += np.roll(wide, turn, axis=1)
        return out

    def blocks(self, size: int = BLOCK) -> Iterator[tuple[int, np.ndarray]]:
        """`(start, rows)` over all rows in order."""
        for start, stored, rows in self._stored(size):
            yield start, self._made(stored, rows)

    def rough_blocks(self, size: int = BLOCK) -> Iterator[tuple[int, np.ndarray]]:
        """`blocks` in float32, about 1e-7 off, in a fraction of the time; the next block takes the place of one."""
        room = np.empty((min(size, len(self)), self.shape[1]), np.float32)
        for start, stored, which in self._stored(size):
            rows, square = room[: len(stored)], np.zeros(1)
            if self.normalize and not self.folded:
                narrow(np.asarray(stored), rows)
                square = _squares(rows)[:, None]
            if ((square > 1e-20) & (square < 1e30)).all():
                rows /= np.sqrt(square)
            else:
                rows[:] = self._made(stored, which)
            yield start, rows

    def _stored(self, size: int) -> Iterator[tuple[int, Any, Any]]:
        """`(start, rows as they are stored, which of x)`. In another order many blocks are read at once: each of them lies in
        all shards."""
        if self.order is None:
            for start in range(0, len(self), size):
                rows = slice(start, min(start + size, len(self)))
                yield start, self.x[rows], rows
            return
        ahead = size * max(1, min(AHEAD // max(1, self.wide), MOST) // size)
        for first in range(0, len(self), ahead):
            which = self.order[first : first + ahead]
            stored = self.x[which]
            for at in range(0, len(which), size):
                yield first + at, stored[at : at + size], which[at : at + size]

    def gather(self, rows: np.ndarray, dtype: Any = np.float64) -> np.ndarray:
        """Any rows in any order, read from the map in ascending order and a block at a time."""
        order = np.argsort(rows if self.order is None else self.order[rows], kind="stable")
        out = np.empty((len(rows), self.shape[1]), dtype)
        for start in range(0, len(rows), BLOCK):
            part = order[start : start + BLOCK]
            out[part] = self[np.asarray(rows, np.int64)[part]]
        return out


def _squares(rows: np.ndarray) -> np.ndarray:
    """‖x_i‖² of float32 rows, a run of columns at a time: in one sum over 65,536 columns 1e-4 is lost."""
    runs = (rows[:, start : start + RUN] for start in range(0, rows.shape[1], RUN))
    return sum((np.einsum("ij,ij->i", run, run).astype(np.float64) for run in runs), np.zeros(len(rows)))


class Held:
    """`gather` for rows that are asked for again and again, as lazy greedy does: 256 MB of those asked for last, or expected."""

    def __init__(self, x: Rows, numbers: int = HELD):
        self.x, self.size, self.next = x, max(1, min(len(x), numbers // max(1, x.shape[1]))), 0
        self.slot, self.row = np.full(len(x), -1, np.int32), np.full(self.size, -1, np.int64)
        self.held = np.empty((self.size, x.shape[1]))

    def gather(self, rows: np.ndarray) -> np.ndarray:
        """Different `rows`, as `Rows.gather` reads them."""
        rows = np.asarray(rows, np.int64)
        found, missing = self.held[self.slot[rows]], np.flatnonzero(self.slot[rows] < 0)
        if len(missing):
            found[missing] = self.x.gather(rows[missing])
            self._keep(rows[missing[-self.size :]], found[missing[-self.size :]])
        return found

    def ahead(self, rows: np.ndarray) -> None:
        """Read different `rows`, as many as there is room for, which come next a few at a time: now shard by shard."""
        rows = rows[: self.size]
        other, here = np.ones(self.size, bool), self.slot[rows]
        other[here[here >= 0]] = False
        missing, free = np.sort(rows[here < 0]), np.flatnonzero(other)
        for start in range(0, len(missing), BLOCK):
            part = missing[start : start + BLOCK]
            self._put(part, self.x.gather(part), free[start : start + len(part)])

    def _keep(self, rows: np.ndarray, read: np.ndarray) -> None:
        """In the place of those that came first."""
        self._put(rows, read, (self.next + np.arange(len(rows))) % self.size)
        self.next = (self.next + len(rows)) % self.size

    def _put(self, rows: np.ndarray, read: np.ndarray, at: np.ndarray) -> None:
        before = self.row[at]
        self.slot[before[before >= 0]] = -1
        self.slot[rows], self.row[at], self.held[at] = at, rows, read
