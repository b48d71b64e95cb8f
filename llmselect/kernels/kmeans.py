"""k-means by FAISS on a keyed sample, assignment in blocks of the pool, and the number of clusters by silhouette."""

from __future__ import annotations

# scikit-learn has no types.
# pyright: reportMissingTypeStubs=false, reportUnknownVariableType=false
import logging
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmselect.errors import UsageError, require
from llmselect.kernels.keyed import Keyed
from llmselect.kernels.rows import Rows
from llmselect.kernels.topk import topk_stable

log = logging.getLogger("llmselect")
ENOUGH = 39  # points per centroid below which FAISS itself warns
SAMPLE = 10_000
HELD = 1 << 28  # numbers of the sample held at once, 1 GB


@dataclass(frozen=True, eq=False)
class Clusters:
    """`label [n]` int32, `distance [n]` float32 (squared Euclidean, to the own centroid), `centroids [k, d]` float32."""

    label: np.ndarray
    distance: np.ndarray
    centroids: np.ndarray

    @property
    def sizes(self) -> np.ndarray:
        """Rows of each cluster `[k]`; a cluster may be empty."""
        return np.bincount(self.label, minlength=len(self.centroids))


def faiss() -> Any:
    """The library, or an error that names the extra."""
    return require("faiss", "cluster")


def kmeans(x: Rows, k: int, rng: Keyed, *, iterations: int = 25, per_centroid: int = 256) -> Clusters:
    """Cluster rows of `x [n, d]` into `k`.

    Centroids come from at most `k · per_centroid` rows drawn by row id, so that the order of the pool does not matter, and
    from fewer (not below 39 each) where those would take more than 1 GB; all rows are then assigned in blocks. The
    same seed gives the same clusters; another number of threads may move rows that lie equally near to two centroids within
    float32.

    Errors: `UsageError` when there are fewer rows than clusters.
    """
    if not 1 <= k <= len(x):
        raise UsageError(f"clusters: {k} is not between 1 and the {len(x)} rows of the pool")
    most = max(k * ENOUGH, HELD // x.shape[1])
    sample = topk_stable(rng.uniform("kmeans"), min(len(x), k * per_centroid, most), rng.keys)
    if len(sample) < k * ENOUGH and k > 1 and len(x) >= ENOUGH:
        log.warning("k-means: %d rows for %d clusters, fewer than %d each: centroids will be rough", len(sample), k, ENOUGH)
    centroids = centroids_of(x.gather(sample, np.float32), k, iterations, x.normalize)
    label, distance = np.empty(len(x), np.int32), np.empty(len(x), np.float32)
    index = faiss().IndexFlatL2(centroids.shape[1])
    index.add(centroids)
    for start, rows in x.blocks():
        here = slice(start, start + len(rows))
        label[here] = index.search(np.ascontiguousarray(rows, np.float32), 1)[1][:, 0]
        # Directly: the expansion that the search uses rounds equal rows differently, and they must tie.
        distance[here] = ((rows - centroids[label[here]]) ** 2).sum(1)
    return Clusters(label, distance, centroids)


def centroids_of(sample: np.ndarray, k: int, iterations: int, spherical: bool) -> np.ndarray:
    """`[k, d]` float32 of all rows of `sample [m, d]`, from one start; unit ones where `spherical`."""
    library = faiss()
    made = library.Kmeans(sample.shape[1], k, niter=iterations, seed=0, spherical=spherical, min_points_per_centroid=1,
                          max_points_per_centroid=max(1, len(sample)))  # fmt: skip
    made.train(np.ascontiguousarray(sample))
    return made.centroids


def silhouettes(x: Rows, candidates: list[int], rng: Keyed) -> dict[int, float]:
    """Mean silhouette (Rousseeuw 1987, by scikit-learn) of k-means with each number of clusters, on at most 10,000 rows."""
    from sklearn import config_context
    from sklearn.metrics import silhouette_score

    rows = topk_stable(rng.uniform("silhouette"), min(len(x), SAMPLE), rng.keys)
    sample = x.gather(rows)
    found: dict[int, float] = {}
    for k in candidates:
        made = kmeans(Rows(sample, normalize=x.normalize), k, Keyed(rng.seed, rng.keys[rows]))
        if 1 < len(np.unique(made.label)) < len(sample):
            with config_context(working_memory=64):  # MB of distances at a time; the default is a gigabyte
                found[k] = float(silhouette_score(sample, made.label))
    return found


def candidates_for(n: int, budget: int) -> list[int]:
    """Numbers of clusters to try: powers of two, at least four rows to a cluster and four picks from each; none for the few rows
    that have no silhouette."""
    most = max(2, min(1024, budget // 4, min(n, SAMPLE) // 4))
    return [k for k in (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024) if k <= most and k < n]
