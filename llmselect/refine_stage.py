"""Iterative refinement as a stage of a run, and what it will take before it starts."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmselect import account, config
from llmselect.errors import LlmselectError, UsageError
from llmselect.prepare import semantic_duplicates
from llmselect.recipe import Recipe
from llmselect.refine import refine, rows_per_round
from llmselect.refine_steps import ModelSteps, Refine
from llmselect.selection import Budget, Selection

if TYPE_CHECKING:
    from llmselect.stages import Run

log = logging.getLogger("llmselect")


def section(recipe: Recipe) -> Refine:
    """The recipe's `refine:` section. Errors: `UsageError` when there is none."""
    if recipe.refine is None:
        raise UsageError("the recipe has no refine: section; give one, e.g. refine.x=rds, where rds is a feature")
    return recipe.refine


def refine_stage(run: Run) -> None:
    """A selection per seed in `selections/<method>/seed-<s>`, its state in `refine/seed-<s>`; nothing without a section."""
    if run.recipe.refine is not None:
        for seed in run.recipe.seeds:
            _refine(run, run.recipe.refine, seed)


def _refine(run: Run, settings: Refine, seed: int) -> None:
    recipe, process = run.recipe, run.process
    out = run.folder / "selections" / settings.method / f"seed-{seed}"
    key = _key(run, settings, seed)
    if (out / "selection.json").exists():
        if lines := config.difference(Selection.load(out).provenance["key"], json.loads(json.dumps(key))):
            raise LlmselectError(f"{out} was selected otherwise:\n  " + "\n  ".join(lines)
                                 + "\nDelete it, or give the run another out=.")  # fmt: skip
        return
    process.wait_for_everyone()  # nobody may save before everybody has looked
    _same_threads(run)
    start, model, train = time.monotonic(), recipe.model, settings.train or recipe.train
    x: Any = run.store[settings.x]
    quality: Any = run.store[settings.quality] if settings.quality else None
    made = refine(run.pool, x, recipe.budget, settings,
                  ModelSteps(settings, model.path, train, seed, model.dtype, model.max_length, recipe.batch_tokens).steps,
                  run.folder / "refine" / f"seed-{seed}", quality=quality, seed=seed, exclude=_lost(run, x, quality), about=key,
                  process=process)  # fmt: skip
    run.main_first(lambda: _save(run, made, out, key, settings.method, time.monotonic() - start))


def _same_threads(run: Run) -> None:
    """Take the threads of the run that began this folder: sums over another number have other last bits."""
    import torch

    from llmselect.stages import TOKENS

    torch.set_num_threads(int(run.store.open(TOKENS).spec["threads"]))


def _save(run: Run, made: Selection, out: Path, key: dict[str, Any], method: str, seconds: float) -> None:
    about = {**made.provenance, "key": key, "method": method}
    account.took(run.folder, account.SELECTIONS, f"{method}/{out.name}", seconds)
    Selection(made.indices, made.n, None, None, made.evidence, made.nested, about, made.ids).save(out)


def _lost(run: Run, x: Any, quality: Any) -> np.ndarray:
    """Rows that cannot be selected: features that are not finite, and semantic duplicates."""
    found: list[Any] = [x.non_finite, [] if quality is None else quality.non_finite]
    if run.recipe.dedup is not None:
        run.main_first(lambda: semantic_duplicates(run))
        found.append(semantic_duplicates(run))
    return np.unique(np.concatenate([np.asarray(one, np.int64) for one in found]))


def _key(run: Run, settings: Refine, seed: int) -> dict[str, Any]:
    recipe = run.recipe
    names = [name for name in (settings.x, settings.quality) if name]
    specs = {name: dict(run.store.open(name.partition(".")[0]).spec) for name in names}
    train = settings.train or recipe.train
    return {"selector": "refine", "config": {**config.to_dict(settings), "train": config.to_dict(train)}, "seed": seed,
            "features": config.fingerprint(specs), "budget": Budget.parse(recipe.budget).plain(),
            "model": config.to_dict(recipe.model), "dedup": config.to_dict(recipe.dedup)}  # fmt: skip


def expected(recipe: Recipe) -> dict[str, Any]:
    """Rows, trainings and answers of each round of one seed; reads the pool at most to count its rows."""
    settings, budget = section(recipe), Budget.parse(recipe.budget)
    if budget.rows is None:
        from llmselect.estimate import count_rows

        rows = budget.rows_of(count_rows(recipe))
    else:
        rows = budget.rows
    share, so_far = rows_per_round(rows, settings.rounds), 0
    rounds = list[dict[str, int]]()
    for number, new in enumerate(share, 1):
        so_far += new
        most = so_far if settings.clusters is None else min(so_far, settings.clusters * settings.probe)
        last = number == len(share)
        rounds.append({"round": number, "new_rows": new, "rows": so_far, "trainings": int(not last),
                       "generations": 0 if last else most})  # fmt: skip
    return {"method": settings.method, "rows": rows, "exact": budget.rows is not None, "rounds": rounds,
            "seeds": len(recipe.seeds), "clusters": settings.clusters, "probe": settings.probe,
            "trainings": len(recipe.seeds) * sum(one["trainings"] for one in rounds),
            "generations": len(recipe.seeds) * sum(one["generations"] for one in rounds)}  # fmt: skip


def text(found: dict[str, Any]) -> str:
    """`expected` for a person."""
    about = "" if found["exact"] else "about "
    lines = [f"{found['method']}: nothing was run; {about}{found['rows']:,} rows in {len(found['rounds'])} rounds"]
    for one in found["rounds"]:
        told = f"train on {one['rows']:,}, at most {one['generations']:,} answers" if one["trainings"] else "no training"
        lines.append(f"  round {one['round']}   {one['new_rows']:,} new rows, {told}")
    by = "clusters by silhouette" if found["clusters"] is None else f"{found['clusters']} clusters"
    lines.append(f"  {by}, at most {found['probe']} answers each; {found['seeds']} seeds: {found['trainings']} trainings, "
                 f"at most {found['generations']:,} answers")  # fmt: skip
    return "\n".join(lines)


def report(run: Run) -> dict[str, Any]:
    """What came out: for each seed the provenance's report."""
    method = section(run.recipe).method
    found = {seed: Selection.load(run.folder / "selections" / method / f"seed-{seed}") for seed in run.recipe.seeds}
    return {f"seed-{seed}": {"rows": len(one), **one.provenance["report"]} for seed, one in found.items()}


def report_text(found: dict[str, Any], shown: int = 8) -> str:
    """The clusters of largest final weight: size, and for each round weight, new rows and mean score."""
    lines = list[str]()
    for seed, one in found.items():
        rounds = one["rounds"]
        order = np.argsort(-np.array(rounds[-1]["weights"]), kind="stable")[:shown]
        head = " ".join(f"| w{i} rows S".ljust(24) for i in range(1, len(rounds) + 1))
        lines += [f"{seed}: {one['rows']} rows, {len(one['sizes'])} clusters", f"  cluster     size {head}"]
        for j in order.tolist():
            cells = list[str]()
            for each in rounds:
                mean = each.get("mean_score", {j: None})[j]
                score = "" if mean is None else f"{mean:+.3f}"
                cells.append(f"| {each['weights'][j]:.3f} {each['rows'][j]:>5} {score}".ljust(24))
            lines.append(f"  {j:>7} {one['sizes'][j]:>8} " + " ".join(cells))
    return "\n".join(lines)
