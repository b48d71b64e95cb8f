"""Linear datamodelling score: does the sum of a method's row scores tell how well a random half of the pool trains?

Park et al., "TRAK: Attributing Model Behavior at Scale", arXiv 2303.14186, section 4: fine-tune on random subsets S_1, …,
S_m of the pool; the score is Spearman's correlation of Σ_{i∈S_j} score_i with the target's outcome of S_j, here the
negative held-out NLL.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from llmselect import atomic, config
from llmselect.benchmark.cells import extract_features
from llmselect.benchmark.claims import claim
from llmselect.benchmark.grid import FULL, Cell, Plan, label
from llmselect.benchmark.statistics import spearman_interval
from llmselect.errors import LlmselectError, UsageError
from llmselect.selection import Selection
from llmselect.stages import Run, select_stage

log = logging.getLogger("llmselect")


@dataclass(frozen=True)
class Lds:
    """Spearman's correlation with its 95 % interval by bootstrap over subsets."""

    method: str
    rho: float
    low: float
    high: float
    subsets: int


def lds(scores: Mapping[str, np.ndarray], members: Sequence[np.ndarray], nll: Sequence[float]) -> list[Lds]:
    """The LDS of every method, best first.

    Args:
        scores: method → `[n]`, higher is better.
        members: the rows of each subset.
        nll: the mean held-out NLL after training on it.
    """
    if len(members) != len(nll) or len(members) < 3:
        raise UsageError(f"LDS: {len(members)} subsets with {len(nll)} losses; at least 3 of each are needed")
    made = list[Lds]()
    for method, values in scores.items():
        sums = np.array([values[rows].sum() for rows in members])
        made.append(Lds(method, *spearman_interval(sums, -np.asarray(nll)), len(members)))
    return sorted(made, key=lambda one: -one.rho if np.isfinite(one.rho) else np.inf)


def subset_rows(ids: Sequence[str], number: int, fraction: float = 0.5) -> np.ndarray:
    """The rows of random subset `number`: drawn by row id, so the same whatever the order of the pool."""
    from llmselect.selectors.random import Random

    return Random().select({"fraction": fraction}, seed=number, ids=ids).indices


def train_subsets(plan: Plan, model: str, folder: Path, count: int = 40, fraction: float = 0.5) -> list[Path]:
    """Fine-tune on subsets 0 … count - 1 and measure them on all tasks, one JSON each; those that exist or that another
    process works on are skipped. Returns the files that exist."""
    if count < 3 or not 0 < fraction < 1:
        raise UsageError(f"subsets: {count} of a share of {fraction}; give at least 3 and a share between 0 and 1")
    features = [name for method in plan.grid.arms() for name in plan.reads(method)]
    with claim(plan.folder / "claims" / model / "features") as alone:
        if not alone:
            raise LlmselectError(f"another process extracts the features of {model}; start again when it is done")
        run = extract_features(plan, model, features)
    ids: list[str] = [*run.pool["id"]]
    made = plan.key(Cell(model, next(iter(plan.grid.sets)), FULL, "100%", 0))
    for number in range(count):
        path = folder / f"subset-{number}.json"
        key = {**{k: v for k, v in made.items() if k != "target"}, "fraction": fraction, "subset": number}
        with claim(plan.folder / "claims" / model / f"lds-{number}") as mine:
            if path.exists() and (lines := config.difference(json.loads(path.read_text())["key"], json.loads(json.dumps(key)))):
                raise LlmselectError(f"{path} was measured with other settings:\n  " + "\n  ".join(lines) + "\nDelete it.")
            if mine and not path.exists():
                atomic.write_json(path, {**_one(run, subset_rows(ids, number, fraction), number), "key": key})
    return [file for number in range(count) if (file := folder / f"subset-{number}.json").exists()]


def _one(run: Run, rows: np.ndarray, number: int) -> dict[str, Any]:
    """Train on some rows, with the same first values and tokens for every subset, and measure."""
    from tempfile import TemporaryDirectory

    from llmselect.evaluate import row_losses
    from llmselect.train import finetune

    pool: Any = run.pool
    model, chosen = run.recipe.model, pool.select(rows)
    start = time.monotonic()
    with TemporaryDirectory(prefix="llmselect-lds-") as scratch:
        out = Path(scratch) / "adapter"
        finetune(chosen, model.path, out, run.recipe.train, seed=0, dtype=model.dtype, max_length=model.max_length,
                 tokens=run.store.tokens)
        found = row_losses(model.path, str(out), run.tests, dtype=model.dtype, max_length=model.max_length,
                           batch_tokens=run.recipe.batch_tokens, tokens=run.store.tokens)  # fmt: skip
    nll = {task: round(float(values.mean()), 6) for task, values in found.items()}
    log.info("subset %d: NLL %.4f", number, np.mean(list(nll.values())))
    return {"rows": len(rows), "ids": config.fingerprint(sorted(chosen["id"])), "nll": nll,
            "seconds": round(time.monotonic() - start, 2)}  # fmt: skip


def scores_of(run: Run, methods: Sequence[str]) -> dict[str, np.ndarray]:
    """Method → scores of the whole pool `[n]`, of the methods whose selections hold some; higher means picked earlier.

    Scores per target group are averaged. A method that takes its smallest scores has them negated. Rows without a score
    get the mean of the others: they say nothing.
    """
    found = dict[str, np.ndarray]()
    for arm in methods:
        only = Run(replace(run.recipe, methods={arm: run.recipe.methods[arm]}, seeds=run.recipe.seeds[:1]))
        select_stage(only)
        made = Selection.load(run.folder / "selections" / arm / f"seed-{run.recipe.seeds[0]}")
        if made.scores is None:
            continue
        scores: np.ndarray = np.asarray(made.scores, np.float64).reshape(made.n, -1).mean(1)
        scores[~np.isfinite(scores)] = scores[np.isfinite(scores)].mean()
        found[arm] = scores if scores[made.indices].mean() >= scores.mean() else -scores
    return found


def report(plan: Plan, model: str, target: str, files: Sequence[Path]) -> list[Lds]:
    """The LDS of the methods that the grid has, selecting for one set of tasks, over the subsets measured.

    Errors: `LlmselectError` for a subset of another pool.
    """
    run = Run(plan.recipe(model))
    arms = {plan.arm(method, label(budgets[0]), target): method for method, (_, budgets) in plan.grid.arms().items()}
    ids: list[str] = [*run.pool["id"]]
    members, nll = list[np.ndarray](), list[float]()
    for file in files:
        about = json.loads(file.read_text())
        rows = subset_rows(ids, about["key"]["subset"], about["key"]["fraction"])
        if config.fingerprint(sorted(ids[int(i)] for i in rows)) != about["ids"]:
            raise LlmselectError(f"{file} was measured on another pool; delete it")
        members.append(rows)
        nll.append(float(np.mean([about["nll"][task] for task in plan.grid.sets[target]])))
    return lds({arms[arm]: scores for arm, scores in scores_of(run, list(arms)).items()}, members, nll)


def markdown(found: Mapping[str, Sequence[Lds]], title: str) -> str:
    """The table: a line per method, a column per set of tasks, the best mean first."""
    by_method: dict[str, dict[str, Lds]] = {}
    for target, table in found.items():
        for one in table:
            by_method.setdefault(one.method, {})[target] = one
    mean = {name: float(np.mean([one.rho for one in row.values()])) for name, row in by_method.items()}
    best = sorted(by_method, key=lambda name: -mean[name] if np.isfinite(mean[name]) else np.inf)
    lines = ["| method | mean | " + " | ".join(found) + " |", "|---|---:|" + "---:|" * len(found)]
    for name in best:
        cells = [f"{one.rho:+.2f} [{one.low:+.2f}, {one.high:+.2f}]" if (one := by_method[name].get(t)) else "" for t in found]
        lines.append(f"| {name} | {mean[name]:+.3f} | " + " | ".join(cells) + " |")
    return "\n".join([f"# {title}", "", *lines, ""])
