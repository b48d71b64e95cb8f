"""What a grid has done, what is missing, and how long that will take."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from llmselect.benchmark.cells import extracted, missing
from llmselect.benchmark.grid import BASE, Cell, Plan, needs
from llmselect.benchmark.results import Result, load


def outlook(plan: Plan, only: Mapping[str, set[str]] | None = None) -> dict[str, Any]:
    """Cells done and missing by method, and the seconds that the missing ones take one after the other.

    The time of a cell is the mean of the done ones of its method, else of all; that of a model without features the mean
    of the others. While nothing is done, speed is measured on some rows with the first of them.
    """
    cells, left = plan.cells(only), set(missing(plan, only))
    done = [load(plan.results / cell.path) for cell in cells if cell not in left]
    features = {name for cell in cells for name in plan.reads(cell.method)}
    ready = {c.model: extracted(plan, c.model, features) for c in cells}
    known = [seconds for seconds in ready.values() if seconds is not None]
    unready = {c.model for c in left if ready[c.model] is None}
    table: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for cell in cells:
        table[f"{cell.method} {cell.budget}"][cell in left] += 1
    if done:
        each, extract = _per_cell(done, left), float(np.mean(known)) if known else 0.0
        note = f"from {len(done)} cells done"
    else:
        each, extract = _measured(plan, next(iter(cells)), left) if left else (0.0, 0.0)
        note = "speed measured on some rows of the pool here"
    return {"cells": len(cells), "done": len(done), "missing": len(left), "methods": dict(table),
            "seconds": round(each + extract * len(unready), 1), "extract": len(unready), "note": note}  # fmt: skip


def _per_cell(done: list[Result], left: set[Cell]) -> float:
    spent: dict[str, list[float]] = defaultdict(list)
    for one in done:
        spent[one.method].append(sum(v for k, v in one.seconds.items() if k != "features"))
    usual = float(np.mean([s for method, group in spent.items() for s in group if method != BASE] or [0.0]))
    return sum(float(np.mean(spent[cell.method])) if cell.method in spent else usual for cell in left)


def _measured(plan: Plan, first: Cell, left: set[Cell]) -> tuple[float, float]:
    from llmselect.estimate import estimate

    recipe, arm = plan.recipe(first.model), next(plan.arm_of(c) for c in plan.cells() if c.method == "random")
    used = {name: one for name, one in recipe.features.items() if any(name in plan.reads(c.method) for c in left)}
    unread: dict[str, Any] = {s: None for s in ("sae", "color") if not any(needs(one, s) for one in used.values())}
    found = estimate(replace(recipe, methods={arm: recipe.methods[arm]}, seeds=[0], features=used, **unread))
    trainings = len({(c.model, plan.arm_of(c), c.seed) for c in left if c.method != BASE})
    return 60 * found["train_minutes"] * trainings, 60 * found["extract_minutes"]


def text(found: dict[str, Any], plan: Plan) -> str:
    """The outlook for a person."""
    from llmselect.engine.progress import duration

    lines = [f"{plan.grid.name}: {found['done']} of {found['cells']} cells done, {found['missing']} missing"]
    lines += [f"  {name:<28} {done:>4} done {lacking:>4} missing" for name, (done, lacking) in found["methods"].items()]
    if found["missing"]:
        lines.append(f"  features to extract with {found['extract']} models")
        lines.append(f"  about {duration(found['seconds'])} in one process ({found['note']})")
    return "\n".join(lines)
