"""Time, memory and slope of loading, storing and selecting at up to ten million rows; every cell in a process of its own.

    python eval/performance/scale.py load --rows 100000 1000000 [--limit 600]
    python eval/performance/scale.py select --rows 10000 100000 1000000 --dim 1024 [--only NAME …] [--limit 600]
    python eval/performance/scale.py select --rows 10000000 --dim 16 --only topk similarity "log_det optimizer=stochastic" …

`load`: short synthetic chats as one JSONL file, as a folder of Parquet files, and as a stream of `datasets` over that folder,
through `load_pool`. `select`: float16 features of 500 directions in a `FeatureStore` (sparse ones: 64 of 4,096 columns; one
number a row where a method reads scores), 60 target rows of three groups, 1 % selected, every registered selector at its
defaults, but for options given beside a name.

Seconds are those of the processor, user and system, on one thread: other work on the machine does not count. Memory is
watched from outside, fifty times a second: `anon` is the peak of RssAnon, what the process holds; `peak` is VmHWM, which counts
pages of mapped files too, and those the system takes back when it needs them. A cell that takes more than `--limit` seconds or
holds more than `--cap` GB is ended and larger sizes of it are left out. Cells are kept in scale.json, so that sizes can be added
one at a time, and scale.md is written from them. `--scratch` holds the data, which is deleted.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from scale_cells import CELLS, write_features, write_pool

RESULTS = Path(__file__).parents[1] / "results" / "performance"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["load", "select", "table", "cell"])
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--budget", default="1%")
    parser.add_argument("--limit", type=float, default=600, help="seconds of the processor for one cell")
    parser.add_argument("--cap", type=float, default=8, help="GB of anonymous memory of one cell")
    parser.add_argument("--only", nargs="+")
    parser.add_argument("--scratch", type=Path, help="a folder for the data; a temporary one by default")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.what == "cell":
        about = json.loads(a.cell)
        print(json.dumps(CELLS[about["part"]](about)))
        return
    known = json.loads((a.out / "scale.json").read_text()) if (a.out / "scale.json").exists() else {"cells": []}
    cells = [{k: v for k, v in one.items() if v is not None} for one in known["cells"]]
    for n in sorted(a.rows) if a.what != "table" else []:
        folder = Path(tempfile.mkdtemp(prefix="scale-", dir=a.scratch))
        try:
            run(a, n, folder, cells)
        finally:
            shutil.rmtree(folder)
    write(a.out, cells)


def run(a: argparse.Namespace, n: int, folder: Path, cells: list[dict[str, Any]]) -> None:
    """Every cell of one size, each result kept as soon as it is there."""
    if a.what == "load":
        plan = [{"part": "load", "name": name, "dim": 0} for name in a.only or ("jsonl", "parquet", "stream")]
        write_pool(folder, n)
    else:
        from llmselect.registry import selectors

        plan = [{"part": "select", "name": name, "dim": a.dim} for name in a.only or selectors.names()]
        plan = [{"part": "store", "name": "write and read", "dim": a.dim}, *plan]
        write_features(folder / "small", 2000, a.dim, plan)
        write_features(folder / "full", n, a.dim, plan[1:])
    for one in plan:
        same = [c for c in cells if all(c[k] == one[k] for k in one)]
        if any("stopped" in c and c["rows"] < n for c in same):
            continue
        about = {**one, "rows": n, "folder": str(folder), "budget": a.budget}
        found = {**one, "rows": n, **watched(about, a.limit, a.cap)}
        print(json.dumps(found), flush=True)
        cells[:] = [c for c in cells if c not in same or c["rows"] != n]
        cells.append(found)
        write(a.out, cells)


def watched(about: dict[str, Any], limit: float, cap: float) -> dict[str, Any]:
    """Run one cell; its seconds, and the peaks of its memory in MB."""
    anon, peak, stopped = 0.0, 0.0, None
    single = {**os.environ, **dict.fromkeys(("OMP_NUM_THREADS", "NUMBA_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")}
    command = [sys.executable, __file__, "cell", "--cell", json.dumps(about)]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as told:
        child = subprocess.Popen(command, stdout=out, stderr=told, env=single)
        while child.poll() is None:
            status = memory(child.pid)
            anon, peak = max(anon, status.get("RssAnon", 0.0)), max(peak, status.get("VmHWM", 0.0))
            if used(child.pid) > limit:
                stopped = f"{limit:g} s"
            elif anon > cap * 1024:
                stopped = f"{cap:g} GB"
            if stopped:
                child.kill()
                child.wait()
                break
            time.sleep(0.02)
        out.seek(0)
        told.seek(0)
        lines, error = out.read().splitlines(), told.read().strip().splitlines()
    found = {"anon_mb": round(anon), "peak_mb": round(peak)}
    if stopped:
        return {**found, "stopped": stopped}
    if child.returncode:
        return {**found, "stopped": (error or ["it ended without a word"])[-1][:200]}
    return {**found, **json.loads(lines[-1])}


def memory(pid: int) -> dict[str, float]:
    """RssAnon, VmHWM … of a process in MB; nothing once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    return {line.split(":")[0]: float(line.split()[1]) / 1024 for line in lines if line.endswith(" kB")}


def used(pid: int) -> float:
    """Seconds of the processor that a process has taken."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def write(out: Path, cells: list[dict[str, Any]]) -> None:
    """scale.json and the tables in scale.md, between its markers."""
    out.mkdir(parents=True, exist_ok=True)
    cells.sort(key=lambda c: (c["part"], c["dim"], c["name"], c["rows"]))
    (out / "scale.json").write_text('{"cells": [\n' + ",\n".join(json.dumps(c) for c in cells) + "\n]}\n")
    text = (out / "scale.md").read_text() if (out / "scale.md").exists() else "# Scale\n\n<!-- tables -->\n<!-- end -->\n"
    before, _, rest = text.partition("<!-- tables -->")
    tables = "\n".join(table(*key, cells) for key in dict.fromkeys((c["part"], c["dim"]) for c in cells))
    (out / "scale.md").write_text(f"{before}<!-- tables -->\n{tables}<!-- end -->{rest.partition('<!-- end -->')[2]}")


def table(part: str, dim: int, cells: list[dict[str, Any]]) -> str:
    """One Markdown table: a row per name, seconds at every size, the slope, the memory at the largest size, and what both
    come to at 100 million rows."""
    here = [c for c in cells if (c["part"], c["dim"]) == (part, dim)]
    sizes = sorted({c["rows"] for c in here})
    title = {"load": "Loading", "store": f"A store of {dim:,} columns", "select": f"Selecting from {dim:,} columns"}[part]
    head = ["", *(f"{n:,} rows, s" for n in sizes), "slope", "at rows", "anon, MB", "peak, MB", "100M rows, h", "and GB"]
    lines = [f"\n### {title}\n", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for name in dict.fromkeys(c["name"] for c in here):
        mine = {c["rows"]: c for c in here if c["name"] == name}
        shown = [cell(mine.get(n)) for n in sizes]
        done = [c for c in mine.values() if "seconds" in c]
        last = [f"{done[-1][k]:,}" for k in ("rows", "anon_mb", "peak_mb")] if done else [""] * 3
        lines.append(f"| `{name}` | {' | '.join([*shown, slope(done), *last, *projected(done)])} |")
    return "\n".join(lines) + "\n"


def cell(found: dict[str, Any] | None) -> str:
    """Seconds, or what ended the cell."""
    if found is None:
        return ""
    return f"> {found['stopped']}" if "stopped" in found else f"{found['seconds']:.2f}"


def slope(done: list[dict[str, Any]]) -> str:
    """The exponent of seconds against rows, by least squares of the logarithms."""
    return f"{exponent(done):.2f}" if len(done) > 1 else ""


def exponent(done: list[dict[str, Any]]) -> float:
    seconds = np.log([max(c["seconds"], 1e-3) for c in done])
    return float(np.polyfit(np.log([c["rows"] for c in done]), seconds, 1)[0])


def projected(done: list[dict[str, Any]], rows: int = 100_000_000) -> tuple[str, str]:
    """Hours and GB at `rows`: seconds by the exponent, at least 1, from the largest size; memory on a line through the last
    two."""
    if len(done) < 2 or done[-1]["rows"] < 1_000_000:  # from fewer rows, constants would be taken for growth
        return "", ""
    before, last = done[-2:]
    hours = last["seconds"] * (rows / last["rows"]) ** max(1.0, exponent(done)) / 3600
    growth = max(0.0, (last["anon_mb"] - before["anon_mb"]) / (last["rows"] - before["rows"]))
    return f"{hours:,.1f}", f"{(last['anon_mb'] + growth * (rows - last['rows'])) / 1024:,.1f}"


if __name__ == "__main__":
    main()
