"""Whitening: the linear map after which pool and targets together have mean 0 and covariance I."""

from __future__ import annotations

# scipy.linalg has no types.
# pyright: reportMissingTypeStubs=false
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from llmselect.errors import LlmselectError
from llmselect.kernels.cosine import unit
from llmselect.kernels.rows import Rows

Kind = Literal["cholesky", "zca"]


@dataclass(frozen=True, eq=False)
class Whitening:
    """`mean [d]` and `factor [d, d]`: whitened rows are (x - μ) factorᵀ, with factor = L⁻¹ (cholesky) or Σ^-½ (zca)."""

    mean: np.ndarray
    factor: np.ndarray
    triangular: bool

    @classmethod
    def fit(cls, x: Rows, target: Rows, ridge: float = 1e-3, kind: Kind = "cholesky") -> Whitening:
        """From all rows of `x [n, d]` and `target [m, d]`, in one pass over each with fp64 sums.

        Σ + ε·tr(Σ)/d·I with ε = `ridge`, relative because gradients may be tiny. `cholesky` inverts Σ = LLᵀ, `zca` takes the
        symmetric root; they differ by a rotation, which no cosine notices.

        Errors: `LlmselectError` when all rows are equal: there is no direction to compare in.
        """
        d, blas = x.shape[1], _blas()
        # About a row of the target as origin: subtracting squares of a large mean would lose the small spread.
        origin, total, square = np.asarray(target[:1])[0], np.zeros(d), np.zeros((d, d), order="F")
        for rows in (x, target):
            for _, part in rows.blocks(max(512, (1 << 22) // d)):
                part = np.ascontiguousarray(part - origin)
                total += part.sum(0)
                square = blas.dsyrk(1.0, part.T, 1.0, square, overwrite_c=1)  # the upper half only
        square = np.triu(square) + np.triu(square, 1).T
        count = len(x) + len(target)
        shift = total / count
        covariance = square / count - np.outer(shift, shift)
        trace = float(np.trace(covariance))
        if not trace > 0:
            raise LlmselectError("whitening: all rows of pool and target are equal; they have no covariance")
        covariance[np.diag_indices(d)] += ridge * trace / d
        return cls(origin + shift, np.asfortranarray(_inverse_root(covariance, kind)), kind == "cholesky")

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """Whitened rows `[b, d]`, not yet of unit length."""
        if not self.triangular:
            return (rows - self.mean) @ self.factor.T
        return _blas().dtrmm(1.0, self.factor, np.ascontiguousarray(rows - self.mean).T, lower=1, overwrite_b=1).T


def _blas() -> Any:
    """Products that know of symmetry and triangles: half the work of general ones."""
    from scipy.linalg import blas

    return blas


def _inverse_root(covariance: np.ndarray, kind: Kind) -> np.ndarray:
    import scipy.linalg

    linalg: Any = scipy.linalg
    try:
        if kind == "cholesky":
            lower = linalg.cholesky(covariance, lower=True)
            return linalg.solve_triangular(lower, np.eye(len(covariance)), lower=True)
        values, vectors = linalg.eigh(covariance)
        return (vectors / np.sqrt(np.maximum(values, 1e-300))) @ vectors.T
    except linalg.LinAlgError as error:
        raise LlmselectError("whitening: the covariance is singular; give a larger ridge") from error


class Whitened:
    """Rows of `x` after whitening, as unit vectors, computed when they are read."""

    unit_rows = True

    def __init__(self, x: Rows, whitening: Whitening | None):
        self.x, self.whitening, self.shape = x, whitening, x.shape

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, rows: Any) -> np.ndarray:
        part = self.x[rows]
        return unit(part if self.whitening is None else self.whitening(part))
