"""Linear datamodelling score of the methods of a grid, on one model and target set.

    python eval/benchmark/lds.py eval/benchmark/grid.yaml [--model NAME] [--target NAME] [--subsets 40] [key=value …]

Fine-tunes on random halves of the pool (a few thousand rows, `pool.limit=3000`), one JSON per subset: type the same to
continue, or in several terminals at once. Then it writes the table of the correlations.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from dataclasses import asdict
from pathlib import Path

from llmselect import atomic
from llmselect.benchmark import lds
from llmselect.benchmark.grid import load_grid
from llmselect.errors import LlmselectError, UsageError
from llmselect.stages import Run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", type=Path)
    parser.add_argument("overrides", nargs="*", help="key=value settings of the grid")
    parser.add_argument("--model", help="default: the first of the grid")
    parser.add_argument("--target", help="default: the first of the grid")
    parser.add_argument("--subsets", type=int, default=40)
    parser.add_argument("--fraction", type=float, default=0.5)
    parser.add_argument("--out", type=Path, help="default: lds/<grid>/<model>/<target> beside the grid")
    a = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        print(measured(a))
    except LlmselectError as error:
        sys.exit(f"lds: {error}")


def measured(a: argparse.Namespace) -> str:
    """Train what is missing and write the report."""
    plan = load_grid(a.grid, a.overrides)
    model, target = a.model or next(iter(plan.grid.models)), a.target or next(iter(plan.grid.sets))
    for kind, name, known in (("model", model, plan.grid.models), ("target", target, plan.grid.sets)):
        if name not in known:
            raise UsageError(f"--{kind} {name}: the grid has {list(known)}")
    out = a.out or plan.home / "lds" / plan.grid.name / model / target
    files = lds.train_subsets(plan, model, target, out, a.subsets, a.fraction)
    found = lds.report(Run(plan.recipe(model, target)), files)
    text = lds.markdown(found, f"LDS on {target}, {model}: random {a.fraction:.0%} of the pool")
    atomic.write_text(out / "lds.json", json.dumps([asdict(one) for one in found], indent=2) + "\n")
    atomic.write_text(out / "lds.md", text)
    return text


if __name__ == "__main__":
    main()
