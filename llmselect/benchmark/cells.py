"""Running a grid: features once per model, then cell after cell, on as many processes as there are."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from llmselect import account, atomic, config
from llmselect.benchmark import costs
from llmselect.benchmark.claims import claim
from llmselect.benchmark.grid import BASE, FULL, SECTIONS, Cell, Plan, needs
from llmselect.benchmark.results import Result, load
from llmselect.errors import LlmselectError
from llmselect.recipe import Recipe
from llmselect.stages import TOKENS, Run

log = logging.getLogger("llmselect")
COSTS = "costs.json"
WAIT = 2.0  # seconds until claims of other processes are looked at again


@dataclass
class Tally:
    """What one process did: cells run, and cells that failed with their errors."""

    ran: list[Cell] = field(default_factory=list[Cell])
    failed: dict[Cell, str] = field(default_factory=dict[Cell, str])


def missing(plan: Plan, only: Mapping[str, set[str]] | None = None) -> list[Cell]:
    """The cells without a file.

    Errors: `LlmselectError` when a file was made with other settings.
    """
    found = list[Cell]()
    for cell in plan.cells(only):
        path = plan.results / cell.path
        if not path.exists():
            found.append(cell)
        elif lines := config.difference(dict(load(path).key), json.loads(json.dumps(plan.key(cell)))):
            raise LlmselectError(f"{path} was measured with other settings:\n  " + "\n  ".join(lines)
                                 + "\nDelete it, or give the grid another name.")  # fmt: skip
    return found


def run_grid(plan: Plan, only: Mapping[str, set[str]] | None = None, *, wait: float = WAIT) -> Tally:
    """Run every missing cell that no other process holds, until none is left; a cell that fails does not stop the others.

    Returns what this process did. It ends when all cells are done, so it may wait for those of other processes.
    """
    tally, ready = Tally(), set[str]()
    needed: dict[str, list[str]] = {}
    for cell in plan.cells(only):
        known = needed.setdefault(cell.model, [])
        known += [name for name in plan.reads(cell.method) if name not in known]
    while todo := [cell for cell in missing(plan, only) if cell not in tally.failed]:
        before = len(tally.ran) + len(tally.failed)
        for cell in todo:
            try:
                _attempt(plan, cell, needed[cell.model], ready, tally)
            except LlmselectError as error:
                tally.failed[cell] = str(error)
                log.error("%s: %s", cell, error)
            except Exception as error:  # a method of a plug-in may fail in any way, and the other cells need not wait for it
                tally.failed[cell] = f"{type(error).__name__}: {error}"
                log.exception("%s: an error of the method, not of what it was given", cell)
        if len(tally.ran) + len(tally.failed) == before:
            time.sleep(wait)
    return tally


def _attempt(plan: Plan, cell: Cell, features: Sequence[str], ready: set[str], tally: Tally) -> None:
    path = plan.results / cell.path
    # What one trains for several targets is trained by one process; the others find its adapter.
    with claim(plan.folder / "claims" / cell.model / f"{plan.arm_of(cell)}-seed-{cell.seed}") as mine:
        if not mine or path.exists():
            return
        if cell.model not in ready and extracted(plan, cell.model, features) is None:
            with claim(_features_claim(plan, cell.model)) as alone:
                if not alone:
                    return
                extract_features(plan, cell.model, features)
        ready.add(cell.model)
        # Rows of a lazy feature are numbered by request: only one process may make requests.
        if any(plan.recipe(cell.model).lazy(name) for name in plan.reads(cell.method)):
            with claim(_features_claim(plan, cell.model)) as alone:
                made = run_cell(plan, cell) if alone else None
        else:
            made = run_cell(plan, cell)
        if made is None:
            return
        made.save(path)
        tally.ran.append(cell)
        log.info("%s: NLL %.4f, %.1f s", cell, made.nll, sum(v for k, v in made.seconds.items() if k != "features"))
        _tidy(plan, cell)


def _tidy(plan: Plan, cell: Cell) -> None:
    """Remove the adapter that no other missing cell needs."""
    arm = plan.arm_of(cell)
    shared = [one for one in plan.cells() if (one.model, one.seed, plan.arm_of(one)) == (cell.model, cell.seed, arm)]
    if plan.grid.keep or cell.method == BASE or not all((plan.results / one.path).exists() for one in shared):
        return
    run = plan.folder / cell.model
    shutil.rmtree(run / "adapters" / arm / f"seed-{cell.seed}", ignore_errors=True)
    (run / "evaluation" / arm / f"seed-{cell.seed}.json").unlink(missing_ok=True)


def _features_claim(plan: Plan, model: str) -> Path:
    return plan.folder / "claims" / model / "features"


def extracted(plan: Plan, model: str, features: Collection[str]) -> float | None:
    """Seconds that all features of a model took so far; None while some of `features` are missing."""
    file = plan.folder / model / COSTS
    known: dict[str, float] = _noted(file)["seconds"] if file.exists() else {}
    lazy = {name for name, one in plan.grid.features.items() if one.get("lazy")}
    return sum(known.values()) if file.exists() and set(features) <= set(known) | lazy else None


def extract_features(plan: Plan, model: str, features: Sequence[str]) -> Run:
    """Pool, targets and `features` of a model, with what must be trained for them, each feature by itself so that its seconds
    are its own; `costs.json` has seconds and forward-equivalents by feature."""
    from llmselect.prepare import prepare, semantic_duplicates
    from llmselect.stages import extract_stage

    run = _with_features(plan, model, features)
    file = run.folder / COSTS
    prepare(run)
    known: dict[str, dict[str, float]] = _noted(file) if file.exists() else {"seconds": {}, "forwards": {}}
    extract_stage(Run(replace(run.recipe, features={})))
    timings = account.seconds(run.folder, account.STAGES)
    for section, count in costs.TRAININGS.items():
        if section in timings and getattr(run.recipe, section) and f"{section}:" not in known["seconds"]:
            known["seconds"][f"{section}:"], known["forwards"][f"{section}:"] = timings[section], round(count(run), 4)
    for name, options in run.recipe.features.items():
        if name not in known["seconds"] and not run.recipe.lazy(name):
            stored = run.store.open(name) if name in run.store else None
            share = len(stored.missing()) / stored.shards if stored else 1.0
            start = time.monotonic()
            extract_stage(Run(_with(run.recipe, {name: options})))
            # What a killed process had done is counted at the speed of the rest.
            known["seconds"][name] = round((time.monotonic() - start) / (share or 1.0), 3)
        known["forwards"][name] = round(costs.forwards(run, name), 4)
        atomic.write_json(file, known)
    atomic.write_json(file, known)
    extract_stage(run)  # finds all features as they are, and writes the quarantine of all of them
    semantic_duplicates(run)
    return run


def _with_features(plan: Plan, model: str, features: Sequence[str]) -> Run:
    """The run of a model with the features asked for and those that it has already."""
    recipe = plan.recipe(model)
    deduplicating = [name for name in (recipe.dedup.x, recipe.dedup.quality) if name] if recipe.dedup else []
    wanted = {*features, *(name.partition(".")[0] for name in deduplicating), *Run(recipe).store.names()}
    kept = {name: options for name, options in recipe.features.items() if name in wanted}
    return Run(_with(recipe, kept))


def _with(recipe: Recipe, features: dict[str, dict[str, Any]]) -> Recipe:
    """A recipe with some features, and what must be trained for them only."""
    unread: dict[str, Any] = {s: None for s in SECTIONS if not any(needs(one, s) for one in features.values())}
    return replace(recipe, features=features, **unread)


def one_arm(plan: Plan, cell: Cell) -> Run:
    """The run of the cell's model with its arm and seed alone."""
    recipe, arm = plan.recipe(cell.model), plan.arm_of(cell)
    methods = {arm: recipe.methods[arm]} if cell.method not in (BASE, FULL) else {}
    return Run(replace(recipe, methods=methods, seeds=[cell.seed], full=cell.method == FULL))


def _measured(plan: Plan, run: Run, cell: Cell) -> dict[str, np.ndarray]:
    """Held-out losses on the cell's tasks; what is trained for all targets is measured on all tasks at once."""
    from llmselect.comparison import measure

    tasks = plan.grid.sets[cell.target]
    if plan.aimed(cell.method):
        run = Run(replace(run.recipe, targets={name: plan.grid.tasks[name] for name in tasks}))
    found = measure(run, plan.arm_of(cell), None if cell.method == BASE else cell.seed)
    return {name: found[name] for name in tasks}


def run_cell(plan: Plan, cell: Cell) -> Result:
    """Select, train and measure one cell; what an earlier process had finished of it is used."""
    from llmselect.comparison import chosen, train_stage

    run, rows, tokens = one_arm(plan, cell), 0, 0
    arm = plan.arm_of(cell)
    seconds = {"features": 0.0, "select": 0.0, "train": 0.0, "evaluate": 0.0}
    forwards = 0.0
    if cell.method not in (BASE, FULL):
        seconds["select"] = _select(run, arm, cell.seed)
        seconds["features"], forwards = _cost(plan, cell, run)
    if cell.method != BASE:
        train_stage(run)
        seconds["train"] = _trained(run, arm, cell.seed)["seconds"]
        cost = np.asarray(run.store[f"{TOKENS}.supervised"])
        selection = chosen(run, arm, cell.seed)[1]
        rows, tokens = (len(cost), cost.sum()) if selection is None else (len(selection), cost[selection.indices].sum())
    start = time.monotonic()
    losses = _measured(plan, run, cell)
    seconds["evaluate"] = time.monotonic() - start
    tests = {name: config.fingerprint([*run.tests[name]["id"]])[:16] for name in losses}
    return Result(plan.grid.name, cell.model, cell.target, cell.method, cell.budget, cell.seed, int(rows), int(tokens),
                  {k: round(float(v), 3) for k, v in seconds.items()}, round(forwards, 4), tests, losses,
                  plan.key(cell))  # fmt: skip


def _select(run: Run, arm: str, seed: int) -> float:
    """Select, and the seconds that it took, now or in an earlier process."""
    from llmselect.stages import select_stage

    kept = run.folder / "selections" / arm / f"seed-{seed}"
    done, start = (kept / "selection.json").exists(), time.monotonic()
    select_stage(run)
    took = time.monotonic() - start
    # Processes that share a run write this file in turn, and an entry may be lost: the clock here is nearly the same.
    return account.seconds(run.folder, account.SELECTIONS).get(f"{arm}/seed-{seed}", 0.0 if done else took)


def _cost(plan: Plan, cell: Cell, run: Run) -> tuple[float, float]:
    """Seconds and forward-equivalents of the features that a method reads, with the warm-up, SAE or adapters they need.

    Of what is made for each task by itself, the share of the cell's tasks.
    """
    known = _noted(run.folder / COSTS)
    names = plan.reads(cell.method)
    for section in SECTIONS:
        names += [f"{section}:"] if any(needs(plan.grid.features[n], section) for n in names if n[-1] != ":") else []
    share = {name: run.array(name).computed / len(run.pool) for name in names if name[-1] != ":" and run.recipe.lazy(name)}
    tasks = len(plan.grid.sets[cell.target]) / len(plan.grid.tasks)
    own = {name: tasks if costs.per_task(run, name) else 1.0 for name in names}
    return (sum(known["seconds"].get(name, 0.0) * own[name] for name in names),
            sum(known["forwards"].get(name, 0.0) * own[name] * share.get(name, 1.0) for name in names))  # fmt: skip


def _trained(run: Run, arm: str, seed: int) -> dict[str, Any]:
    from llmselect.comparison import trained

    return trained(run, arm, seed)["result"]


def _noted(file: Path) -> dict[str, Any]:
    return atomic.read_json(file, f"delete {file} and run again")
