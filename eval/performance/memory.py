"""Does the memory of an extraction grow with the pool?

    python eval/performance/memory.py [--rows 10000 100000]

Makes synthetic pools and a tiny model, extracts TRIM, RDS+ and losses in a fresh process for each size, and prints the
peak resident memory of each.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
import tiny

CHILD = """
import json, resource, sys
from llmselect.prepare import prepare
from llmselect.stages import Run, extract_stage, select_stage
from llmselect.recipe import load_recipe
run = Run(load_recipe(sys.argv[1]))
for stage in (prepare, extract_stage, select_stage):
    stage(run)
    print(json.dumps({"stage": stage.__name__, "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}), flush=True)
"""


def write(path: Path, rows: int) -> str:
    rng = random.Random(0)
    words = " ".join(tiny.TEXTS).split()
    with path.open("w") as file:
        for i in range(rows):
            say = [" ".join(rng.choices(words, k=rng.randint(2, 10))) for _ in range(2)]
            turns = [{"role": "user", "content": f"{i} {say[0]}"}, {"role": "assistant", "content": say[1]}]
            file.write(json.dumps({"messages": turns, "source": f"s{i % 7}"}) + "\n")
    return str(path)


def measure(folder: Path, model: Path, rows: int) -> dict[str, float]:
    place = folder / str(rows)
    place.mkdir()
    recipe = {"name": "memory", "out": str(place / "run"), "model": {"path": str(model), "max_length": 64},
              "pool": {"path": write(place / "pool.jsonl", rows)}, "targets": {"t": {"dev": write(place / "dev.jsonl", 8)}},
              "features": {"rds": {"extractor": "embedding"}, "trim": {"extractor": "trim"},
                           "loss": {"extractor": "loss", "without_prompt": False}},
              "methods": {"rds+": {"selector": "similarity", "x": "rds"}, "trim": {"selector": "topk", "x": "trim"},
                          "balanced": {"selector": "balanced"}}, "budget": {"rows": 500}}  # fmt: skip
    (place / "recipe.yaml").write_text(json.dumps(recipe))
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(place / "recipe.yaml")], check=True, stdout=subprocess.PIPE, text=True
    )
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {line["stage"]: round(line["peak_mb"], 1) for line in lines}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        model = tiny.save(Path(scratch) / "model", layers=1)
        found = {"peak_mb": {str(rows): measure(Path(scratch), model, rows) for rows in a.rows}}
    first, last = (found["peak_mb"][str(r)] for r in (a.rows[0], a.rows[-1]))
    found["growth"] = {stage: round(last[stage] / first[stage] - 1, 4) for stage in first}
    print(json.dumps(found, indent=2))
    if a.out:
        a.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
