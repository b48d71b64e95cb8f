"""k-means-quality and its kin: clusters share the budget by their size, rows are drawn inside each.

Paper: Yu et al., "Diversify and Conquer", arXiv 2409.11378, section 3 (kMQ, kM-Random, kM-Closest).
Objective: k-means into K clusters; budget of cluster j b_j = b·|D_j|/|D|, by largest remainder; inside a cluster `kmq` draws
    by quality (the largest z(q)/τ + Gumbel noise, which is sampling without replacement with p ∝ exp(z(q)/τ), z over the
    pool), `km_random` uniformly, `km_closest` takes the rows nearest to the centroid.
Inputs: `x [n, d]`, an embedding; `quality [n]` for `kmq`, higher is better.
Cost: FAISS k-means on 256 rows a cluster, one GEMM n × K × d to assign, O(n log n). x is read in blocks.
Deviations: the paper leaves the map from quality to probability open; ours is above. Clusters on unit rows.
Defaults: K by the best silhouette among powers of two up to a quarter of the budget; τ = 1 (a standard deviation).
Use: no target; a pool of many topics, with a score (`kmq`) or without one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from llmselect.errors import UsageError
from llmselect.kernels.groups import apportion
from llmselect.kernels.keyed import Keyed
from llmselect.kernels.kmeans import Clusters, candidates_for, kmeans, silhouettes
from llmselect.kernels.rows import Rows
from llmselect.kernels.topk import topk_stable
from llmselect.registry import selectors
from llmselect.selectors._base import Picked, Selector


@dataclass(frozen=True)
class _Clustered(Selector):
    """Evidence: the `cluster` of each row and its `distance` to the centroid. The report tells sizes and silhouettes."""

    stochastic: ClassVar[bool] = True
    nested: ClassVar[bool] = False  # largest remainders of a larger budget may be smaller

    clusters: int | None = field(default=None, metadata={"help": "null: chosen by silhouette"})
    unit: bool = field(default=True, metadata={"help": "cluster directions (cosine) instead of points"})

    def _clustered(self, k: int, rng: Keyed, x: Any) -> tuple[Clusters, dict[str, Any]]:
        rows, report = Rows(x, normalize=self.unit), {}
        count = self.clusters
        if count is None:
            tried = silhouettes(rows, candidates_for(len(rows), k), rng)
            count = max(tried, key=lambda one: (tried[one], -one), default=1)
            report["silhouettes"] = {str(one): value for one, value in tried.items()}
        made = kmeans(rows, count, rng)
        return made, {"clusters": count, "sizes": made.sizes.tolist(), **report}

    def _drawn(self, k: int, rng: Keyed, made: Clusters, value: np.ndarray, report: dict[str, Any]) -> Picked:
        """The rows of highest `value` in each cluster, clusters interleaved so that any prefix is spread over them."""
        share = apportion(k, made.sizes, made.sizes)
        ranked = np.lexsort((rng.keys, -value, made.label))
        start = np.cumsum(made.sizes) - made.sizes
        place = np.arange(len(value)) - start[made.label[ranked]]
        taken = place < share[made.label[ranked]]
        rows, turn = ranked[taken], (place[taken] + 0.5) / share[made.label[ranked[taken]]]
        rows = rows[np.lexsort((rng.keys[rows], turn))]
        evidence = {"cluster": made.label[rows], "distance": made.distance[rows]}
        return Picked(rows, value, evidence=evidence, report={**report, "budgets": share.tolist()})


@selectors.register("kmq")
@dataclass(frozen=True)
class Kmq(_Clustered):
    """Rows of every cluster, drawn by quality."""

    temperature: float = field(default=1.0, metadata={"help": "τ in standard deviations; small: the best rows only"})

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise UsageError(f"temperature: {self.temperature} must be positive")

    def pick(self, k: int, rng: Keyed, *, x: Any, quality: Any) -> Picked:
        quality = np.asarray(quality[:], np.float64)
        topk_stable(quality, 0, rng.keys)  # names rows without a finite quality
        score = (quality - quality.mean()) / max(float(quality.std()), 1e-12) / self.temperature
        made, report = self._clustered(k, rng, x)
        return self._drawn(k, rng, made, score - np.log(-np.log(rng.uniform("draw"))), report)


@selectors.register("km_random")
@dataclass(frozen=True)
class KmRandom(_Clustered):
    """Rows of every cluster, drawn uniformly."""

    def pick(self, k: int, rng: Keyed, *, x: Any) -> Picked:
        made, report = self._clustered(k, rng, x)
        return self._drawn(k, rng, made, rng.uniform("draw"), report)


@selectors.register("km_closest")
@dataclass(frozen=True)
class KmClosest(_Clustered):
    """The rows of every cluster that lie nearest to its centroid."""

    def pick(self, k: int, rng: Keyed, *, x: Any) -> Picked:
        made, report = self._clustered(k, rng, x)
        return self._drawn(k, rng, made, -made.distance, report)
