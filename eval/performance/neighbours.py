"""The graph of nearest neighbours beside an inverted file of FAISS: seconds, and the share of the nearest rows that each finds.

    python eval/performance/neighbours.py [--rows 100000] [--dim 1024] [--pool pool.jsonl.gz] [--out FILE]

Two kinds of rows: synthetic ones around 500 directions as in `scale.py`, and with `--pool` the texts of a pool by TF-IDF in 256
dimensions (truncated SVD). The inverted file has 4√n lists in half precision and reads 32 of them for each row. Both look for
64 neighbours; recall is that of 3,000 rows against all cosines, of the nearest 64 and of the nearest 10 (among the 64 found).
Seconds are those of the processor.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import faiss
import numpy as np

from llmselect.kernels.neighbours import neighbours
from llmselect.kernels.rows import Rows

COUNT, JUDGED = 64, 3000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--pool", type=Path)
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    found = {"clustered": compared(clustered(a.rows, a.dim))}
    if a.pool:
        found["texts"] = compared(texts(a.pool))
    print(json.dumps(found, indent=2))
    if a.out:
        a.out.write_text(json.dumps(found, indent=2) + "\n")


def clustered(n: int, dim: int) -> np.ndarray:
    directions = np.random.default_rng(0).standard_normal((500, dim), np.float32)
    rng = np.random.default_rng(1)
    return (directions[rng.integers(0, 500, n)] + rng.standard_normal((n, dim), np.float32)).astype(np.float16)


def texts(path: Path) -> np.ndarray:
    """The first 4,000 characters of every row."""
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    from llmselect.pool import load_pool

    said = [" ".join(turn["content"] for turn in row)[:4000] for row in load_pool(path)["messages"]]
    terms = TfidfVectorizer(min_df=5, max_features=40_000, sublinear_tf=True).fit_transform(said)
    return TruncatedSVD(256, n_iter=2, random_state=0).fit_transform(terms).astype(np.float16)


def compared(x: np.ndarray) -> dict:
    unit = np.concatenate([rows.astype(np.float32) for _, rows in Rows(x).blocks()])
    judged = np.sort(np.random.default_rng(7).permutation(len(x))[:JUDGED])
    best = faiss.knn(unit[judged], unit, COUNT + 1, metric=faiss.METRIC_INNER_PRODUCT)[1]
    best = np.array([[j for j in near if j != own][:COUNT] for own, near in zip(judged, best, strict=True)])
    found = {"rows": len(x), "dim": x.shape[1]}
    for name, search in (("llmselect", lambda: neighbours(Rows(x), COUNT)[0]), ("inverted_file", lambda: inverted_file(unit))):
        start = time.process_time()
        near = search()[judged]
        found[name] = {"seconds": round(time.process_time() - start, 1)}
        for k in (COUNT, 10):
            shares = [len(np.intersect1d(a[:k], b)) / k for a, b in zip(best, near, strict=True)]
            found[name][f"recall_{k}"] = round(float(np.mean(shares)), 4)
    return found


def inverted_file(unit: np.ndarray) -> np.ndarray:
    n, d = unit.shape
    lists, half = int(4 * np.sqrt(n)), faiss.ScalarQuantizer.QT_fp16
    index = faiss.IndexIVFScalarQuantizer(faiss.IndexFlatIP(d), d, lists, half, faiss.METRIC_INNER_PRODUCT, False)
    index.nprobe = 32
    index.train(unit[np.random.default_rng(0).permutation(n)[: 64 * lists]])
    index.add(unit)
    near = index.search(unit, COUNT + 1)[1]
    own = near == np.arange(n)[:, None]
    own[~own.any(1), -1] = True
    return near[~own].reshape(n, COUNT)


if __name__ == "__main__":
    main()
