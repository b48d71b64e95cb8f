"""How well sketched gradient cosines follow exact ones, over dimensions.

    python eval/performance/sketch_fidelity.py --model DIR --pool FILE --target FILE [--rows 100]

Exact: the same gradients without projection and sketch. Pearson correlation of all pool × target cosines and Spearman
correlation of the pool's mean cosine, for several seeds of the projection. Mode lora: a new adapter warmed up on the
rows themselves for some steps, Adam's direction on the pool side.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from llmselect.engine.extraction import extract
from llmselect.extractors import Gradient
from llmselect.pool import load_pool
from llmselect.store import FeatureStore
from llmselect.train import Train, finetune


def cosines(pool: Any, target: Any, folder: Path, one: Gradient) -> np.ndarray:
    """`[pool, target]` cosines of stored rows."""
    store = FeatureStore(folder)
    extract(pool, store, {"g": one}, target=target)
    x, t = (store[name][:].astype(np.float32) for name in ("g", "g@target"))
    x, t = x / np.linalg.norm(x, axis=1, keepdims=True), t / np.linalg.norm(t, axis=1, keepdims=True)
    return x @ t.T


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "pool", "target"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--rows", type=int, default=100)
    parser.add_argument("--dims", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    pool, target = load_pool(a.pool, limit=a.rows), load_pool(a.target, group="t", limit=10)
    found: dict[str, Any] = {"rows": len(pool), "targets": len(target), "seeds": a.seeds, "pearson, spearman": {}}
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        train = Train(tokens=8000, batch_tokens=1000, checkpoints=1, lora={"r": 8})
        finetune(pool, a.model, place / "warm", train, seed=0, max_length=256)
        shared = {"model": a.model, "max_length": 256}
        lora = {"mode": "lora", "checkpoints": str(place / "warm"), "preconditioner": "adam", **shared}
        for name, options, ks in (("base", shared, (64, 16)), ("lora", lora, (64,))):
            exact = cosines(pool, target, place / name, Gradient(**options, k=None, dim=None, store="float32"))
            for k in ks:
                for dim in a.dims:
                    scores = []
                    for seed in range(a.seeds):
                        one = Gradient(**options, k=k, dim=dim, seed=seed)
                        made = cosines(pool, target, place / f"{name}-{k}-{dim}-{seed}", one)
                        rank = float(spearmanr(made.mean(1), exact.mean(1)).statistic)
                        scores.append((np.corrcoef(made.ravel(), exact.ravel())[0, 1], rank))
                    label = f"{name} k = {k}, dim {dim}" if name == "base" else f"lora r = 8 adam, dim {dim}"
                    middle, spread = np.mean(scores, 0), np.std(scores, 0)
                    found["pearson, spearman"][label] = [f"{m:.4f} ± {s:.4f}" for m, s in zip(middle, spread, strict=True)]
                    print(label, found["pearson, spearman"][label], flush=True)
    if a.out:
        a.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
