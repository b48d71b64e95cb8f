"""Set functions of rows for `kernels.greedy`: none of them builds an n × n matrix."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from llmselect.kernels.graph import undirected
from llmselect.kernels.rows import Held, Rows

ROUGH = 1024  # rows on each side of a product in float32, 4 MB
ROUNDING = 4e-6  # of a product of a unit row in float32, with room


class Coverage:
    """Facility location f(S) = Σ_i max_{j ∈ S} s_ij on a sparse graph; s_ii = 1, s_ij = max(0, cos) between neighbours of
    either side, else 0. Memory: that of `kernels.graph`."""

    def __init__(self, near: np.ndarray, cosine: np.ndarray):
        self.graph, self.covered = undirected(near, cosine, above=0), np.zeros(len(near))

    def bounds(self) -> np.ndarray:
        return self.gains(np.arange(len(self.covered)))

    def gains(self, rows: np.ndarray) -> np.ndarray:
        out = np.empty(len(rows))
        _coverage()(self.graph.start, self.graph.other, self.graph.cosine, self.covered, rows, out)
        return out

    def add(self, row: int) -> None:
        theirs, cosine = self.graph[row]
        self.covered[theirs], self.covered[row] = np.maximum(self.covered[theirs], cosine), 1


@lru_cache(maxsize=1)
def _coverage() -> Any:
    import numba

    @numba.njit(parallel=True, nogil=True, cache=True)
    def gains(start: Any, other: Any, cosine: Any, covered: Any, rows: Any, out: Any) -> None:  # pragma: no cover - compiled
        for i in numba.prange(len(rows)):
            total = 1 - covered[rows[i]]
            for j in range(start[rows[i]], start[rows[i] + 1]):
                more = cosine[j] - covered[other[j]]
                if more > 0:
                    total += more
            out[i] = total

    return gains


class GraphCut:
    """f(S) = Σ_{i ∈ V, j ∈ S} s_ij - λ Σ_{i, j ∈ S} s_ij with s_ij = (1 + cos) / 2 over all pairs, exactly.

    Linear in the rows, so Σ_i s_ij = (n + ⟨x_j, Σx⟩) / 2 needs one vector, not a matrix.
    """

    def __init__(self, x: Rows, penalty: float):
        self.held, self.penalty, self.count = Held(x), penalty, 0
        self.sum = np.zeros(x.shape[1])
        whole = sum((rows.sum(0) for _, rows in x.blocks()), np.zeros(x.shape[1]))
        self.total = np.concatenate([(len(x) + rows @ whole) / 2 for _, rows in x.blocks()])

    def bounds(self) -> np.ndarray:
        return self.total - self.penalty

    def refresh(self) -> np.ndarray:
        """In float32; what its rounding may take away is added."""
        bound, narrow = np.empty(len(self.total)), self.sum.astype(np.float32)
        slack = ROUNDING * float(np.linalg.norm(self.sum)) - self.count - 1
        for start, rows in self.held.x.rough_blocks():
            bound[start : start + len(rows)] = slack - (rows @ narrow).astype(np.float64)
        return self.total + self.penalty * bound

    def expect(self, rows: np.ndarray) -> None:
        self.held.ahead(rows)

    def gains(self, rows: np.ndarray) -> np.ndarray:
        inside = (self.count + self.held.gather(rows) @ self.sum) / 2
        return self.total[rows] - self.penalty * (2 * inside + 1)

    def add(self, row: int) -> None:
        self.count, self.sum = self.count + 1, self.sum + self.held.gather(np.array([row]))[0]


class LogDet:
    """f(S) = log det(I + α X_S X_Sᵀ), the volume that rows span.

    The gain of x is log(1 + α q), q = xᵀ M x with M = (I + α X_Sᵀ X_S)⁻¹ `[d, d]`, kept by rank-one updates (Sherman-Morrison):
    M ← M - u uᵀ with u = M x √(α / (1 + α q)). So a q from an earlier S falls by ⟨x, u⟩² for every row taken since: O(d) each,
    and O(d²) anew where more than d were. `refresh` does so for all rows, in float32. The u take 8·k·d bytes.
    """

    def __init__(self, x: Rows, scale: float):
        self.held, self.scale, self.inverse = Held(x), scale, np.eye(x.shape[1])
        self.taken, self.count, self.seen = np.zeros((16, x.shape[1])), 0, np.zeros(len(x), np.int64)
        self.form = np.concatenate([(rows**2).sum(1) for _, rows in x.blocks()])
        self.above, self.refreshed = self.form.copy(), 0

    def bounds(self) -> np.ndarray:
        return np.log1p(self.scale * self.form)

    def refresh(self) -> np.ndarray:
        """From what the rows taken since the last time take away, in float32; what its rounding may add is left standing."""
        recent = self.taken[self.refreshed : self.count]
        length, self.refreshed, narrow = float((recent**2).sum()), self.count, recent.astype(np.float32)
        for start, rows in self.held.x.rough_blocks():
            here = slice(start, start + len(rows))
            fall = ((rows @ narrow.T) ** 2).sum(1, dtype=np.float64)
            # |Σ (⟨x, u⟩ + e)² - Σ ⟨x, u⟩²| ≤ 2 √(Σ ⟨x, u⟩² Σ e²), and e is below ROUNDING · |u|
            self.above[here] -= fall - 2 * ROUNDING * np.sqrt(fall * length) - ROUNDING**2 * length
        return np.log1p(self.scale * np.maximum(np.minimum(self.above, self.form), 0))

    def expect(self, rows: np.ndarray) -> None:
        self.held.ahead(rows)

    def gains(self, rows: np.ndarray) -> np.ndarray:
        x, seen = self.held.gather(rows), self.seen[rows]
        old = self.count - seen > x.shape[1]
        self.form[rows[old]] = ((x[old] @ self.inverse) * x[old]).sum(1)
        near, since = ~old, int(seen[~old].min(initial=self.count))
        fall = (x[near] @ self.taken[since : self.count].T) ** 2
        fall[np.arange(since, self.count) < seen[near, None]] = 0  # counted when the row was looked at before
        self.form[rows[near]] -= fall.sum(1)
        self.seen[rows] = self.count
        return np.log1p(self.scale * np.maximum(self.form[rows], 0))

    def add(self, row: int) -> None:
        x = self.held.gather(np.array([row]))[0]
        turned = self.inverse @ x
        turned *= np.sqrt(self.scale / (1 + self.scale * (x @ turned)))
        self.inverse -= np.outer(turned, turned)
        self.taken, self.count = _appended(self.taken, self.count, turned), self.count + 1


class Spread:
    """k-center: the gain of a row is its squared distance 2 - 2 cos to the nearest row taken (Gonzalez 1985).

    A row's distance is brought up to date only when it is looked at, against the rows taken since then; `refresh` lowers the
    bounds of all rows, in float32. The first row is the one nearest to the mean of the pool.
    """

    def __init__(self, x: Rows):
        self.held, self.taken, self.count = Held(x), np.zeros((16, x.shape[1])), 0
        self.near, self.seen = np.full(len(x), np.inf), np.zeros(len(x), np.int64)
        whole = sum((rows.sum(0) for _, rows in x.blocks()), np.zeros(x.shape[1]))
        center = whole / max(np.linalg.norm(whole), 1e-300)
        self.above = np.concatenate([6 + rows @ center for _, rows in x.blocks()])  # above any distance
        self.refreshed = 0

    def bounds(self) -> np.ndarray:
        return self.above

    def refresh(self) -> np.ndarray:
        recent, self.refreshed = self.taken[self.refreshed : self.count].astype(np.float32), self.count
        for start, rows in self.held.x.rough_blocks():
            for at in range(0, len(rows), ROUGH):
                above = self.above[start + at : start + min(at + ROUGH, len(rows))]
                for first in range(0, len(recent), ROUGH):
                    best = (rows[at : at + ROUGH] @ recent[first : first + ROUGH].T).max(1)
                    np.minimum(above, 2 - 2 * best.astype(np.float64) + 2 * ROUNDING, out=above)
        return self.above

    def expect(self, rows: np.ndarray) -> None:
        self.held.ahead(rows)

    def gains(self, rows: np.ndarray) -> np.ndarray:
        if not self.count:
            return self.above[rows]
        since = int(self.seen[rows].min())
        # In float32 first: the distance of equal rows is then 0, not what is left of rounding.
        cosine = (self.held.gather(rows) @ self.taken[since : self.count].T).astype(np.float32)
        if cosine.shape[1]:
            self.near[rows] = np.minimum(self.near[rows], np.maximum(2 - 2 * cosine.max(1), 0))
        self.seen[rows] = self.count
        return self.near[rows]

    def add(self, row: int) -> None:
        self.taken = _appended(self.taken, self.count, self.held.gather(np.array([row]))[0])
        self.count += 1


def _appended(rows: np.ndarray, count: int, row: np.ndarray) -> np.ndarray:
    """`rows` with `row` in place `count`; twice as many where it is full."""
    if count == len(rows):
        rows = np.concatenate([rows, np.zeros_like(rows)])
    rows[count] = row
    return rows
