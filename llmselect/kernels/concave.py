"""Concave coverage of columns as an objective of `kernels.greedy`."""

from __future__ import annotations

from typing import Any

import numpy as np

from llmselect.arrays import Csr
from llmselect.kernels.sparse import products

EPSILON = 1e-6


class Concave:
    """f(S) = Σ_l φ(Z_l), Z = Σ_{i∈S} x_i, φ(z) = (z + 1e-6)^power, by its linearised gain Σ_l φ'(Z_l) x_il.

    `tags` is t ≥ 0 `[n, width]` as `kernels.sparse` gathers it, `weight` w ≥ 0 `[n]`, v_ij = w_i t_ij, and `spread` P ≥ 0
    `[width, width]`, a `scipy.sparse.csr_array`; x = v P is not made: a gain is w_i Σ_j t_ij (P φ'(Z))_j, and P φ'(Z) is kept up
    to date where Z changes.
    """

    def __init__(self, tags: Csr, weight: np.ndarray, spread: Any, power: float):
        self.tags, self.weight, self.spread, self.power = tags, weight, spread, power
        self.back, self.mass = spread.tocsc(), np.zeros(tags.width)
        self.worth = spread @ self._slope(self.mass)

    def bounds(self) -> np.ndarray:
        return self.gains(np.arange(len(self.weight)))

    def gains(self, rows: np.ndarray) -> np.ndarray:
        return self.weight[rows] * products(self.tags, rows, self.worth)

    def add(self, row: int) -> None:
        columns, values = self.tags.row(row)
        theirs = self.spread[columns]
        self.mass += theirs.T @ (self.weight[row] * values.astype(np.float64))
        changed = np.unique(self.back[:, np.unique(theirs.indices)].indices)
        self.worth[changed] = self.spread[changed] @ self._slope(self.mass)

    def _slope(self, mass: np.ndarray) -> np.ndarray:
        return self.power * (mass + EPSILON) ** (self.power - 1)
