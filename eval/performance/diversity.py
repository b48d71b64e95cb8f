"""k-means beside scikit-learn and bare FAISS, and facility location on a graph of neighbours beside its dense value.

    python eval/performance/diversity.py [--rows 200000] [--dim 384] [--clusters 1000] [--out FILE]

Synthetic unit rows around 2,000 directions. k-means: seconds, and the mean squared distance of every row to the mean of its
cluster, which judges spherical and plain centroids alike. Our `kmeans` reads a float16 file in blocks and assigns all
rows; the others hold the rows in float32. Facility location: time, gains computed and peak
memory at 100,000 rows; on 5,000 rows the dense value of its selection over that of dense greedy.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

import faiss
import numpy as np

from llmselect.kernels import objectives
from llmselect.kernels.greedy import maximize
from llmselect.kernels.keyed import Keyed
from llmselect.kernels.kmeans import kmeans
from llmselect.kernels.neighbours import neighbours
from llmselect.kernels.rows import Rows
from llmselect.selectors.set_functions import FacilityLocation

BLOCK = 8192


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rows", 200_000), ("dim", 384), ("clusters", 1000), ("facility_rows", 100_000)):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        x = features(Path(folder) / "x.npy", a.rows, a.dim)
        found = {"rows": a.rows, "dim": a.dim, "facility_location": facility(x[: a.facility_rows])}
        found["facility_location"]["peak_rss_gb"] = peak()
        found |= {"k_means": clustering(x, a.clusters), "peak_rss_gb": peak()}
    print(json.dumps(found, indent=2))
    if a.out:
        a.out.write_text(json.dumps(found, indent=2) + "\n")


def features(path: Path, rows: int, dim: int) -> np.ndarray:
    """Unit rows in float16 on disk."""
    rng = np.random.default_rng(0)
    directions = rng.standard_normal((2000, dim))
    x = np.lib.format.open_memmap(path, "w+", np.float16, (rows, dim))
    for start in range(0, rows, BLOCK):
        size = min(BLOCK, rows - start)
        part = directions[rng.integers(0, 2000, size)] + rng.standard_normal((size, dim))
        x[start : start + size] = part / np.linalg.norm(part, axis=1, keepdims=True)
    x.flush()
    return np.load(path, mmap_mode="r")


def clustering(x: np.ndarray, k: int) -> dict:
    """Every method from one start, FAISS with 20 iterations; the time is that of training and of assigning all rows."""
    from sklearn.cluster import MiniBatchKMeans

    n, rows = len(x), np.asarray(x, np.float32)
    found = {}
    start = time.perf_counter()
    made = kmeans(Rows(x), k, Keyed(0, np.arange(n, dtype=np.uint64)), iterations=20)
    found["llmselect"] = about(start, rows, made.label)
    for name, per in (("faiss, 256 rows a centroid", 256), ("faiss, all rows", n)):
        start = time.perf_counter()
        one = faiss.Kmeans(x.shape[1], k, niter=20, seed=0, spherical=True, max_points_per_centroid=per)
        one.train(rows)
        label = one.index.search(rows, 1)[1][:, 0]
        found[name] = about(start, rows, label)
    for name, options in (("MiniBatchKMeans, defaults", {}), ("MiniBatchKMeans, batches of 10,000", {"batch_size": 10_000})):
        start = time.perf_counter()
        one = MiniBatchKMeans(k, n_init=1, random_state=0, **options).fit(rows)
        found[name] = about(start, rows, one.labels_)
    return found


def facility(x: np.ndarray) -> dict:
    """Five per cent of `x`; and the share of the dense value on 5,000 rows."""
    start = time.perf_counter()
    made = FacilityLocation().select("5%", x=x)
    report = made.provenance["report"]
    k = len(made)
    found = {"rows": len(x), "selected": k, "seconds": round(time.perf_counter() - start, 1), "gains_per_pick": round(
        report["evaluations"] / k, 1)}  # fmt: skip
    small = Rows(x[:5000])
    keyed = Keyed(0, np.arange(5000, dtype=np.uint64))
    dense = np.maximum(small[:] @ small[:].T, 0)
    value = lambda rows: float(dense[:, rows].max(1).sum())  # noqa: E731
    best = maximize(objectives.Coverage(*neighbours(small, 4999)), 250, keyed)
    for edges in (16, 32, 64, 128):
        some = maximize(objectives.Coverage(*neighbours(small, edges)), 250, keyed)
        found[f"value_with_{edges}_neighbours"] = round(value(some.order) / value(best.order), 4)
    quick = maximize(objectives.Coverage(*neighbours(small, 64)), 250, keyed, "stochastic", 0.05)
    return {**found, "value_stochastic_64": round(value(quick.order) / value(best.order), 4)}


def about(start: float, rows: np.ndarray, label: np.ndarray) -> dict[str, float]:
    """Seconds since `start`, and 1 - Σ_j n_j ‖mean_j‖² / n of unit rows."""
    seconds = time.perf_counter() - start
    sums = np.zeros((int(label.max()) + 1, rows.shape[1]))
    np.add.at(sums, label, rows)
    sizes = np.maximum(np.bincount(label, minlength=len(sums)), 1)
    distance = 1 - float(((sums / sizes[:, None]) ** 2).sum(1) @ sizes) / len(rows)
    return {"seconds": round(seconds, 1), "mean_squared_distance": round(distance, 4)}


def peak() -> float:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)


if __name__ == "__main__":
    main()
