"""A pool on a plane: principal components of a feature, found in blocks from a part of the rows."""

from __future__ import annotations

from typing import Any

import numpy as np

from llmselect.kernels.rows import Rows
from llmselect.store import FeatureStore

FIT_ROWS = 20_000  # more rows move the axes less than a dot is wide
WIDTH = 1024  # wider features are folded: the covariance is WIDTH × WIDTH
BLOCK = 2048


def feature_of(store: FeatureStore) -> str | None:
    """The feature that a map is drawn from: an embedding, else any other dense one with two columns or more."""
    found: dict[str, str] = {}
    for name in store.names():
        feature = store.open(name)
        dtype, shape = feature.spec["arrays"].get("value", ("", []))
        if name.endswith("@target") or feature.missing() or not dtype.startswith("float") or len(shape) != 1 or shape[0] < 3:
            continue
        found.setdefault(str(feature.spec.get("extractor")), name)
    return found.get("embedding") or next((found[one] for one in sorted(found)), None)


class Plane:
    """The two directions of largest variance of unit rows of `x [n, d]`.

    `share`: of the variance, that the two directions hold.
    """

    def __init__(self, x: Any, seed: int = 0):
        n, lost = int(x.shape[0]), x.non_finite
        draw = np.random.default_rng(seed).choice(n, min(n, FIT_ROWS + len(lost)), replace=False, shuffle=False)
        rows = np.setdiff1d(draw, lost)[:FIT_ROWS] if n > FIT_ROWS else np.setdiff1d(draw, lost)
        self.x, self.rows = x, Rows(x, dim=WIDTH)
        width = self.rows.shape[1]
        total, square = np.zeros(width), np.zeros((width, width))
        for start in range(0, len(rows), BLOCK):
            block = self.rows[rows[start : start + BLOCK]]
            total += block.sum(0)
            square += block.T @ block
        count = max(1, len(rows))
        self.mean = total / count
        values, vectors = np.linalg.eigh(square / count - np.outer(self.mean, self.mean))
        axes = vectors[:, ::-1][:, :2]
        # The sign of an eigenvector is arbitrary: fixed, so that the same run gives the same page.
        self.axes = axes * np.sign(axes[np.abs(axes).argmax(0), [0, 1]])
        variance = np.maximum(values, 0)
        self.share = float(variance[-2:].sum() / variance.sum()) if variance.sum() > 0 else 0.0

    def project(self, x: Any, rows: np.ndarray) -> np.ndarray:
        """Places `[r, 2]` of some rows of an array of the same columns; NaN where a row has none."""
        out = np.full((len(rows), 2), np.nan)
        lost = np.isin(rows, x.non_finite)
        read = Rows(x, dim=WIDTH)
        good = np.flatnonzero(~lost)
        for start in range(0, len(good), BLOCK):
            at = good[start : start + BLOCK]
            out[at] = (read[rows[at]] - self.mean) @ self.axes
        return out

    def nearest(self, rows: np.ndarray, target: Any) -> tuple[np.ndarray, np.ndarray]:
        """The target row of highest cosine for each of `rows`, and that cosine; -1 and NaN where a row has none."""
        index, cosine = np.full(len(rows), -1), np.full(len(rows), np.nan)
        count: int = target.shape[0]
        theirs = np.setdiff1d(np.arange(count), target.non_finite)
        good = np.flatnonzero(~np.isin(rows, self.x.non_finite))
        if not len(theirs):
            return index, cosine
        # Unfolded, so that the cosine shown is the one a method would find.
        unit = Rows(target)[theirs]
        for start in range(0, len(good), BLOCK):
            at = good[start : start + BLOCK]
            similar = Rows(self.x)[rows[at]] @ unit.T
            index[at], cosine[at] = theirs[similar.argmax(1)], similar.max(1)
        return index, cosine
