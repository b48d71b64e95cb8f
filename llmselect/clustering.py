"""Clusters of a feature as the groups of a selector: S2L is `balanced` on loss trajectories, CaR `car` on embeddings."""

from __future__ import annotations

# scipy has no types.
# pyright: reportMissingTypeStubs=false
import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmselect import atomic, config
from llmselect.array_views import Subset
from llmselect.arrays import fold_ids
from llmselect.errors import UsageError
from llmselect.kernels.cosine import unit
from llmselect.kernels.keyed import Keyed, keys_of
from llmselect.kernels.kmeans import kmeans
from llmselect.kernels.rows import Rows

if TYPE_CHECKING:
    from llmselect.stages import Run


@dataclass(frozen=True)
class Clustering:
    """The `groups:` of a method: k-means clusters of feature `x` in the place of sources."""

    x: str = field(metadata={"help": "a feature, e.g. a loss trajectory or an embedding"})
    clusters: int = field(default=100, metadata={"help": "of k-means; fewer where the pool has fewer rows"})
    normalize: bool = field(default=True, metadata={"help": "by direction (embeddings); false: by distance (trajectories)"})
    seed: int = 0

    def __post_init__(self) -> None:
        if self.clusters < 1:
            raise UsageError(f"clusters: {self.clusters} must be at least 1")

    @classmethod
    def parse(cls, given: Any, where: str) -> Clustering | None:
        """From a feature's name, a mapping, or `source`, which is no clustering. Errors: `UsageError` naming `where`."""
        if given is None or given == "source":
            return None
        return config.from_dict(cls, {"x": given} if isinstance(given, str) else given, where)


def clusters_of(x: Any, wanted: Clustering, ids: Any = None) -> np.ndarray:
    """The cluster `[n]` int32 of each row of `x [n, d]`; -1 for rows marked as not finite in a store."""
    n: int = x.shape[0]
    label = np.full(n, -1, np.int32)
    lost: np.ndarray = getattr(x, "non_finite", np.zeros(0, np.int64))
    rows = np.delete(np.arange(n), lost)
    ids = getattr(x, "ids", None) if ids is None else ids
    keys = fold_ids(ids.raw) if hasattr(ids, "raw") else keys_of(ids, n)
    held = Rows(Subset(x, rows) if len(lost) else x, normalize=wanted.normalize)
    label[rows] = kmeans(held, min(wanted.clusters, len(rows)), Keyed(wanted.seed, keys[rows])).label
    return label


def memberships(x: Any, clusters: int, *, top: int = 4, sharpness: float = 20.0, seed: int = 0, ids: Any = None) -> Any:
    """How far each row of `x [n, d]` belongs to k-means clusters by direction: tags for `mig` and `instag` where there are none.

    m_ij = exp(s·cos(x_i, c_j)) / Σ_l exp(s·cos(x_i, c_l)) over the `top` nearest centroids, 0 for others; s the `sharpness`.

    Returns `scipy.sparse.csr_array [n, clusters]` float32 whose rows sum to 1. Errors: `UsageError` for impossible settings;
    `LlmselectError` naming rows that are not finite.
    """
    from scipy.sparse import csr_array

    if not 1 <= top <= clusters or not sharpness > 0:
        raise UsageError(f"top: {top} must be from 1 to clusters: {clusters}, and sharpness: {sharpness} above 0")
    rows = Rows(x)
    keys = keys_of(getattr(x, "ids", None) if ids is None else ids, len(rows))
    centroids = unit(np.asarray(kmeans(rows, clusters, Keyed(seed, keys)).centroids, np.float64))
    near, value = np.empty((len(rows), top), np.int64), np.empty((len(rows), top), np.float32)
    for start, part in rows.blocks():
        cosine = part @ centroids.T
        best = np.argsort(-cosine, axis=1, kind="stable")[:, :top]
        weight = np.exp(sharpness * (np.take_along_axis(cosine, best, 1) - cosine.max(1, keepdims=True)))
        here = slice(start, start + len(part))
        near[here], value[here] = best, weight / weight.sum(1, keepdims=True)
    made = csr_array((value.ravel(), near.ravel(), np.arange(len(rows) + 1) * top), shape=(len(rows), clusters))
    made.sort_indices()
    return made


def stored_clusters(x: Any, wanted: Clustering, folder: Path, spec: Mapping[str, Any]) -> np.ndarray:
    """The same, found once: kept in `folder` under a name that stands for the settings and the feature's `spec`."""
    name = config.fingerprint({"clustering": config.to_dict(wanted), "feature": dict(spec)})[:24]
    file = folder / f"{name}.npy"
    if file.exists():
        return np.load(file, allow_pickle=False)
    label, buffer = clusters_of(x, wanted), io.BytesIO()
    np.save(buffer, label, allow_pickle=False)
    folder.mkdir(parents=True, exist_ok=True)
    atomic.write_bytes(file, buffer.getvalue())
    return label


def clusters_for(run: Run, wanted: Clustering | None, dropped: np.ndarray | None) -> dict[str, np.ndarray]:
    """`groups`, the clusters in the place of sources, and `exclude`: `dropped` and the rows without finite numbers, which are
    in no cluster. Nothing for None."""
    if wanted is None:
        return {}
    x: Any = run.store[wanted.x]
    groups = stored_clusters(x, wanted, run.folder / "clusters", run.store.open(wanted.x.partition(".")[0]).spec)
    lost = np.flatnonzero(groups < 0)
    return {"groups": groups, "exclude": lost if dropped is None else np.union1d(dropped, lost)}
