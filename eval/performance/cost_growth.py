"""How the cost of every selector grows with the pool: seconds and peak memory at several sizes, the log-log slope, a plot.

    python eval/performance/cost_growth.py [--rows 10000 30000 100000 300000] [--dim 128] [--budget 1%] [--limit 300]
        [--only NAME …] [--out FOLDER]

Every cell runs in a process of its own, which loads float16 features of 500 directions from disk as a memory map (sparse
ones: 64 of 4,096 columns) and 60 target rows of three groups. Peak memory is that of the process, less that of one which
imports the same and selects nothing. A selector that took more than `--limit` seconds is not run on larger pools.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from synthetic import write_directions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 30_000, 100_000, 300_000])
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--budget", default="1%")
    parser.add_argument("--limit", type=float, default=300)
    parser.add_argument("--only", nargs="+")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--cell", nargs=3, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.cell:
        print(json.dumps(cell(Path(a.cell[0]), a.cell[1], int(a.cell[2]), a)))
        return
    from llmselect.registry import selectors

    table: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        write_directions(Path(folder) / "x.npy", max(a.rows), a.dim, 500, np.random.default_rng(0))
        floor = {n: run(folder, "", n, a)["peak_mb"] for n in a.rows}
        for name in a.only or selectors.names():
            table[name] = grow(folder, name, floor, a)
            print(name, json.dumps(table[name]), flush=True)
    if a.out:
        a.out.mkdir(parents=True, exist_ok=True)
        settings = {"rows": a.rows, "dim": a.dim, "budget": a.budget, "limit_seconds": a.limit}
        (a.out / "cost.json").write_text(json.dumps({**settings, "selectors": table}, indent=2) + "\n")
        plot(table, a.out / "cost.svg")
    print("\n".join(markdown(table, a.rows)))


def markdown(table: dict[str, dict[str, Any]], rows: list[int]) -> list[str]:
    """The table of `selectors.md`; memory is that at the largest size run."""
    lines = [
        f"| selector | {' | '.join(f'{n:,} rows, s' for n in sorted(rows))} | slope | memory, MB |",
        "|---" * (len(rows) + 3) + "|",
    ]
    for name, one in table.items():
        took, held = one.get("seconds", {}), list(one.get("extra_mb", {}).values())
        seconds = [f"{took[str(n)]:.2f}" if str(n) in took else "" for n in sorted(rows)]
        memory = f"{held[-1]:,.0f}" if held else one["error"]
        lines.append(f"| `{name}` | {' | '.join(seconds)} | {one.get('slope', '')} | {memory} |")
    return lines


def grow(folder: str, name: str, floor: dict[int, float], a: argparse.Namespace) -> dict[str, Any]:
    """Seconds and memory of one selector at every size."""
    seconds: dict[str, float] = {}
    peak: dict[str, float] = {}
    for n in sorted(a.rows):
        if seconds and max(seconds.values()) > a.limit:
            break
        found = run(folder, name, n, a)
        if "error" in found:
            return found
        seconds[str(n)], peak[str(n)] = round(found["seconds"], 3), round(max(0.0, found["peak_mb"] - floor[n]), 1)
    sizes = np.log([int(n) for n in seconds])
    slope = float(np.polyfit(sizes, np.log(np.maximum(list(seconds.values()), 1e-3)), 1)[0]) if len(sizes) > 1 else None
    return {"seconds": seconds, "extra_mb": peak, "slope": None if slope is None else round(slope, 2)}


def run(folder: str, name: str, n: int, a: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "--cell", folder, name, str(n), "--dim", str(a.dim), "--budget", a.budget]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def cell(folder: Path, name: str, n: int, a: argparse.Namespace) -> dict[str, Any]:
    """One selection, timed the second time so that nothing is compiled or imported in it."""
    from llmselect.registry import selectors
    from llmselect.selectors._base import inputs_of

    seconds = 0.0
    if name:
        cls: Any = selectors.get(name)
        one, wanted = cls(), inputs_of(cls)
        # The small selection imports and compiles; it is not timed.
        for rows in (min(n, 2000), n):
            inputs = made(folder, wanted, one, rows, a.dim)
            start = time.perf_counter()
            one.select(a.budget, n=rows, **inputs)
            seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def made(folder: Path, wanted: dict[str, bool], one: Any, n: int, dim: int) -> dict[str, Any]:
    """The inputs that a hook declares, for the first `n` rows."""
    rng = np.random.default_rng(1)
    x = np.load(folder / "x.npy", mmap_mode="r")[:n]
    target = np.asarray(x[:60], np.float32) + 0.5 * rng.standard_normal((60, dim)).astype(np.float32)
    if one.sparse:
        x, target = sparse(n, rng), sparse(60, rng).toarray()
    elif 2 not in one.x_ndim:
        x = np.asarray(x[:, 0], np.float32)
    quality = rng.standard_normal((n, 4) if 2 in one.quality_ndim else n)
    found = {"x": x, "target": target, "target_groups": np.repeat(list("abc"), 20), "quality": quality,
             "target_cost": rng.integers(1, 500, 60), "groups": rng.choice(list("abcdefgh"), n),
             "cost": rng.integers(1, 500, n)}  # fmt: skip
    return {k: v for k, v in found.items() if k in wanted}


def sparse(n: int, rng: np.random.Generator, width: int = 4096, nonzero: int = 64) -> Any:
    from scipy.sparse import csr_array

    columns = np.sort(rng.integers(0, width, (n, nonzero)), axis=1).ravel()
    made = csr_array((rng.random(n * nonzero, np.float32), columns, np.arange(n + 1) * nonzero), shape=(n, width))
    made.sum_duplicates()
    return made


def plot(table: dict[str, dict[str, Any]], path: Path) -> None:
    """Seconds against rows, both logarithmic."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "llmselect"  # the same bytes from the same numbers
    figure, axes = pyplot.subplots(figsize=(9, 6))
    for i, (name, one) in enumerate(sorted(table.items())):
        if one.get("seconds"):
            sizes = [int(n) for n in one["seconds"]]
            style = {"marker": "osv^D"[i // 10 % 5], "markersize": 4, "linewidth": 1}
            axes.plot(sizes, list(one["seconds"].values()), label=f"{name} ({one['slope']})", **style)
    axes.set(xscale="log", yscale="log", xlabel="rows of the pool", ylabel="seconds")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, ncols=2, title="selector (log-log slope)", title_fontsize=7)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
