"""Semantic duplicates: rows whose embedding lies too near to that of a row that stays.

Paper: SemDeDup, Abbas et al., arXiv 2303.09540, section 3.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llmselect.errors import UsageError, nearest
from llmselect.kernels.keyed import Keyed, keys_of
from llmselect.kernels.kmeans import kmeans
from llmselect.kernels.rows import Rows
from llmselect.kernels.topk import topk_stable

BLOCK = 1024


@dataclass(frozen=True)
class Dedup:
    """Drop rows that mean the same as a row that stays (SemDeDup), by the cosine of a feature."""

    x: str = field(metadata={"help": "a feature, e.g. an embedding"})
    threshold: float = field(default=0.95, metadata={"help": "cosine above which rows count as the same"})
    clusters: int | None = field(default=None, metadata={"help": "rows are compared inside clusters; null: one per 1,000 rows"})
    quality: str | None = field(default=None, metadata={"help": "feature of which the best row stays; null: a random one"})

    def check(self, features: Collection[str]) -> None:
        """Errors: `UsageError` for a feature that is not there and a threshold that is none."""
        for key in ("x", "quality"):
            feature = getattr(self, key)
            if feature is not None and feature.partition(".")[0] not in features:
                raise UsageError(f"dedup.{key}: no feature '{feature}'.{nearest(feature, features)} There are: {list(features)}")
        if not 0 < self.threshold < 1:
            raise UsageError(f"dedup.threshold: {self.threshold} must lie between 0 and 1")


@dataclass(frozen=True, eq=False)
class Duplicates:
    """`dropped [r]` rows, ascending; of each the `nearest [r]` row that stays in its cluster, and their `cosine [r]`."""

    dropped: np.ndarray
    nearest: np.ndarray
    cosine: np.ndarray

    def __len__(self) -> int:
        return len(self.dropped)


def semantic_duplicates(x: Any, threshold: float = 0.95, *, clusters: int | None = None, quality: Any = None,
                        seed: int = 0, ids: Any = None, first: np.ndarray | None = None) -> Duplicates:  # fmt: skip
    """Rows of `x [n, d]` with a cosine above `threshold` to a row that stays.

    Rows are compared inside k-means clusters only, in blocks: O(n²/clusters · d) time, no n × n matrix. Within a cluster
    they are gone through best first and stay unless one that stays is too near; so no two rows that stay in one cluster
    lie above the threshold, and every dropped row has one that stays.

    Args:
        clusters: None takes one per 1,000 rows.
        quality: `[n]`, of near rows the higher one stays; None: at random, by seed and row id.
        first: `[n]`, whether a row goes before all others, e.g. one of an earlier pool: those fall only to one another.

    Errors: `UsageError` for a threshold outside (0, 1).
    """
    if not 0 < threshold < 1:
        raise UsageError(f"threshold: {threshold} must lie between 0 and 1")
    rows = Rows(x)
    rng = Keyed(seed, keys_of(ids if ids is not None else getattr(x, "ids", None), len(rows)))
    rank = np.empty(len(rows), np.int64)
    worth = rng.uniform("semdedup") if quality is None else np.asarray(quality[:], np.float64)
    order = topk_stable(worth, len(rows), rng.keys)
    if first is not None:
        order = order[np.argsort(~first[order], kind="stable")]
    rank[order] = np.arange(len(rows))
    label = kmeans(rows, clusters or max(1, len(rows) // 1000), rng).label
    parts = [_cluster(rows, np.flatnonzero(label == c), rank, threshold) for c in np.unique(label)]
    dropped, nearest, cosine = (np.concatenate(one) for one in zip(*parts, strict=True))
    order = np.argsort(dropped)
    return Duplicates(dropped[order], nearest[order], cosine[order])


def _cluster(x: Rows, members: np.ndarray, rank: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    members = members[np.argsort(rank[members])]
    kept, vectors = np.zeros(0, np.int64), np.zeros((0, x.shape[1]))
    dropped, nearest, cosine = list[np.ndarray](), list[np.ndarray](), list[np.ndarray]()
    for start in range(0, len(members), BLOCK):
        rows = members[start : start + BLOCK]
        part = x.gather(rows)
        near = _largest(part, vectors)
        inside = (part @ part.T).astype(np.float32)
        stays = near <= threshold
        for i in np.flatnonzero(stays):  # in rank order: a row falls to any better one of the block that stays
            if stays[i]:
                later = inside[i] > threshold
                later[: i + 1] = False
                stays &= ~later
        kept, vectors = np.concatenate([kept, rows[stays]]), np.concatenate([vectors, part[stays]])
        dropped.append(rows[~stays])
    gone = np.concatenate([np.zeros(0, np.int64), *dropped])
    for start in range(0, len(gone), BLOCK):  # against all that stayed, the nearest of which may be a later one
        similar = (x.gather(gone[start : start + BLOCK]) @ vectors.T).astype(np.float32)
        nearest.append(kept[similar.argmax(1)])
        cosine.append(similar.max(1))
    return gone, np.concatenate([np.zeros(0, np.int64), *nearest]), np.concatenate([np.zeros(0, np.float32), *cosine])


def _largest(part: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    return (part @ vectors.T).astype(np.float32).max(1) if len(vectors) else np.full(len(part), -1, np.float32)
