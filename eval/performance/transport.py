"""TAROT against its floor, and the automatic ratio against a version that starts again at every k.

    python eval/performance/transport.py [--rows 100000] [--dim 2048] [--targets 300] [--repeats 3] [--out FILE]

Synthetic unit features with 200 directions and noise, in float16 on disk. Floor: one GEMM n × m × d in float64 over the
same blocks and the 5 % largest of each column by `np.argpartition`; ratios are of neighbouring runs. `selection` is TAROT on
features as they are (`whiten: none`), `whole` with whitening (covariance and a d × d product per row besides). Then the
automatic ratio on the same features, and the same curve by its definition: neighbours, costs and transport anew at each k.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from synthetic import write_directions

from llmselect.kernels.cosine import BLOCK, unit
from llmselect.kernels.transport import exact
from llmselect.selectors.tarot import Tarot
from llmselect.selectors.tarot_auto import TarotAuto


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rows", 100_000), ("dim", 2048), ("targets", 300), ("repeats", 3), ("naive_rows", 20_000)):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        x, target = features(Path(folder) / "x.npy", a.rows, a.dim, a.targets)
        found = {"rows": a.rows, "dim": a.dim, "targets": a.targets, "repeats": a.repeats, **fixed(x, target, a)}
        found |= automatic(x[: a.naive_rows], target, a)
    found["peak_rss_gb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
    print(json.dumps(found, indent=2))
    if a.out:
        a.out.write_text(json.dumps(found, indent=2) + "\n")


def features(path: Path, rows: int, dim: int, targets: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows around 200 directions, on disk; targets around ten of them."""
    rng = np.random.default_rng(0)
    directions = write_directions(path, rows, dim, 200, rng)
    return np.load(path, mmap_mode="r"), directions[rng.integers(0, 10, targets)] + rng.standard_normal((targets, dim))


def fixed(x: np.ndarray, target: np.ndarray, a: argparse.Namespace) -> dict:
    k, ratios = a.rows // 20, {"selection": [], "whole": []}
    unit_target = unit(target)
    seconds = {"floor": [], "selection": [], "whole": []}
    for _ in range(a.repeats):
        seconds["floor"].append(timed(lambda: floor(x, unit_target, k)))
        seconds["selection"].append(timed(lambda: Tarot(whiten="none", dim=a.dim).select(k, x=x, target=target)))
        seconds["whole"].append(timed(lambda: Tarot(dim=a.dim).select(k, x=x, target=target)))
        for name in ratios:
            ratios[name].append(seconds[name][-1] / seconds["floor"][-1])
    return {"fixed": {name: spread(values) for name, values in ratios.items()},
            "seconds": {name: round(statistics.median(values), 2) for name, values in seconds.items()}}  # fmt: skip


def floor(x: np.ndarray, target: np.ndarray, k: int) -> None:
    """One product in blocks and the k largest of each column."""
    out = np.empty((len(x), len(target)), np.float32)
    for start in range(0, len(x), BLOCK):
        out[start : start + BLOCK] = x[start : start + BLOCK].astype(np.float64) @ target.T
    np.argpartition(-out.max(1), k)


def automatic(x: np.ndarray, target: np.ndarray, a: argparse.Namespace) -> dict:
    one = TarotAuto(whiten="none", dim=a.dim, patience=5)
    found: dict = {}
    ours, theirs = [], []
    for _ in range(a.repeats):
        ours.append(timed(lambda: found.update(one.select("100%", x=x, target=target).provenance["report"])))
        theirs.append(again(x, target, found))
    return {"automatic": {"rows": len(x), "ratio_found": round(found["ratio"], 5), "speedup": spread([b / o for o, b in zip(
        ours, theirs, strict=True)]), "steps": sum(len(f["curve"]) for f in found["folds"]),
        "seconds": round(statistics.median(ours), 2), "again_seconds": round(statistics.median(theirs), 2)}}  # fmt: skip


def again(x: np.ndarray, target: np.ndarray, found: dict) -> float:
    """Seconds for the same folds and steps when at each k the cosines, neighbours, costs and transport are computed from
    nothing: one step in ten is run, and the time multiplied by ten."""
    target = unit(target)
    fold = np.arange(len(target)) % 10
    steps = [(f, k + 1) for f, one in enumerate(found["folds"]) for k in range(len(one["curve"]))]
    start = time.perf_counter()
    for f, k in steps[::10]:
        choosers, judges = target[fold == f], target[fold != f]
        similar = np.concatenate([unit(x[i : i + BLOCK]) @ choosers.T for i in range(0, len(x), BLOCK)])
        rows = np.unique(np.argpartition(-similar, k, axis=0)[:k])
        exact(np.sqrt(np.maximum(2 - 2 * unit(x[rows]) @ judges.T, 0)))
    return (time.perf_counter() - start) * len(steps) / len(steps[::10])


def spread(values: list[float]) -> dict[str, float]:
    return {"median": round(statistics.median(values), 2), "min": round(min(values), 2), "max": round(max(values), 2)}


def timed(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
