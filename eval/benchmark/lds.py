"""Linear datamodelling score of the methods of a grid, on one model and every set of targets.

    python eval/benchmark/lds.py eval/benchmark/grid.yaml [--model NAME] [--subsets 40] [key=value …]

Fine-tunes on random halves of the pool (a few thousand rows, `pool.limit=3000`), one JSON per subset: type the same to
continue, or in several terminals at once. Then it writes the table of the correlations.
"""

from __future__ import annotations

import argparse
import logging
import sys
from dataclasses import asdict
from pathlib import Path

from llmselect import atomic
from llmselect.benchmark import lds
from llmselect.benchmark.grid import load_grid
from llmselect.errors import LlmselectError, UsageError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", type=Path)
    parser.add_argument("overrides", nargs="*", help="key=value settings of the grid")
    parser.add_argument("--model", help="default: the first of the grid")
    parser.add_argument("--subsets", type=int, default=40)
    parser.add_argument("--fraction", type=float, default=0.5)
    parser.add_argument("--out", type=Path, help="default: lds/<grid>/<model> beside the grid")
    a = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        print(measured(a))
    except LlmselectError as error:
        sys.exit(f"lds: {error}")


def measured(a: argparse.Namespace) -> str:
    """Train what is missing and write the report."""
    plan = load_grid(a.grid, a.overrides)
    model = a.model or next(iter(plan.grid.models))
    if model not in plan.grid.models:
        raise UsageError(f"--model {model}: the grid has {list(plan.grid.models)}")
    out = a.out or plan.home / "lds" / plan.grid.name / model
    files = lds.train_subsets(plan, model, out, a.subsets, a.fraction)
    found = {target: lds.report(plan, model, target, files) for target in plan.grid.sets}
    text = lds.markdown(found, f"LDS, {model}: {len(files)} random subsets of {a.fraction:.0%} of the pool")
    atomic.write_json(out / "lds.json", {target: [asdict(one) for one in table] for target, table in found.items()})
    atomic.write_text(out / "lds.md", text)
    return text


if __name__ == "__main__":
    main()
