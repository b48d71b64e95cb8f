"""Concave coverage of columns as an objective of `kernels.greedy`."""

from __future__ import annotations

from typing import Any

import numpy as np

EPSILON = 1e-6


class Concave:
    """f(S) = Σ_l φ(Z_l), Z = Σ_{i∈S} x_i, φ(z) = (z + 1e-6)^power, by its linearised gain Σ_l φ'(Z_l) x_il.

    `rows` is v ≥ 0 `[n, width]` and `spread` P ≥ 0 `[width, width]`, both `scipy.sparse.csr_array`; x = v P is not made:
    a gain is Σ_j v_ij (P φ'(Z))_j, and P φ'(Z) is kept up to date where Z changes.
    """

    def __init__(self, rows: Any, spread: Any, power: float):
        self.rows, self.spread, self.power = rows, spread, power
        self.back = spread.tocsc()
        self.mass = np.zeros(rows.shape[1])
        self.worth = spread @ self._slope(self.mass)

    def bounds(self) -> np.ndarray:
        return self.rows @ self.worth

    def gains(self, rows: np.ndarray) -> np.ndarray:
        return self.rows[rows] @ self.worth

    def add(self, row: int) -> None:
        at = slice(self.rows.indptr[row], self.rows.indptr[row + 1])
        theirs = self.spread[self.rows.indices[at]]
        self.mass += theirs.T @ self.rows.data[at]
        changed = np.unique(self.back[:, np.unique(theirs.indices)].indices)
        self.worth[changed] = self.spread[changed] @ self._slope(self.mass)

    def _slope(self, mass: np.ndarray) -> np.ndarray:
        return self.power * (mass + EPSILON) ** (self.power - 1)
