"""Training and measuring every method at equal tokens, and the table that sets them side by side."""

from __future__ import annotations

# datasets has no types.
# pyright: reportMissingTypeStubs=false
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from llmselect import account, atomic, config
from llmselect.evaluate import bootstrap, evaluate
from llmselect.selection import Selection
from llmselect.stages import TOKENS, Run

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger("llmselect")
BASE, FULL, RANDOM = "base", "full", "random"


@dataclass(frozen=True)
class Row:
    """One line of the result table; losses in nats per token, averaged over tasks."""

    method: str
    rows: int
    tokens: int
    nll: float
    low: float
    high: float
    sd: float | None
    difference: float | None
    difference_low: float | None
    difference_high: float | None
    tasks: dict[str, float]
    select_seconds: float | None
    train_seconds: float | None


def selecting(run: Run) -> list[str]:
    """What has a selection: the methods, and iterative refinement if asked for."""
    return [*run.recipe.methods, *([run.recipe.refine.method] if run.recipe.refine else [])]


def arms(run: Run) -> list[str]:
    """What is trained: the selections, and the whole pool if asked for."""
    return [*selecting(run), *([FULL] if run.recipe.full else [])]


def chosen(run: Run, method: str, seed: int) -> tuple[Dataset, Selection | None]:
    """The rows that a method trains on; `full` is the whole pool."""
    if method == FULL:
        return run.pool, None
    selection = Selection.load(run.folder / "selections" / method / f"seed-{seed}")
    return selection.to_dataset(run.pool, repeat=selection.weights is not None), selection


def train_stage(run: Run) -> None:
    """An adapter per method and seed, all with the same supervised tokens and steps."""
    from llmselect.train import finetune

    model, cells = run.recipe.model, [(m, s) for s in run.recipe.seeds for m in arms(run)]
    with run.timed("train"):
        for i, (method, seed) in enumerate(cells):
            rows, selection = chosen(run, method, seed)
            about = {
                "method": method,
                "rows": len(rows),
                **({"selection": dict(selection.provenance["key"])} if selection else {}),
            }
            made = finetune(
                rows,
                model.path,
                run.folder / "adapters" / method / f"seed-{seed}",
                run.recipe.train,
                seed=seed,
                dtype=model.dtype,
                max_length=model.max_length,
                provenance=about,
                tokens=run.store.tokens,
            )
            log.info(
                "trained %d of %d: %s, seed %d: %d rows, %d tokens, %d steps, %.1f s",
                i + 1,
                len(cells),
                method,
                seed,
                len(rows),
                made.tokens,
                made.steps,
                made.seconds,
            )


def evaluate_stage(run: Run) -> list[Row]:
    """Held-out loss of the base model and of every adapter; writes `results.json` and `results.md`."""
    if not run.tests:
        log.info("no target has test rows: nothing to measure")
        return []
    losses: dict[str, list[dict[str, np.ndarray]]] = {}
    with run.timed("evaluate"):
        for method, seed in [(BASE, None), *((m, s) for m in arms(run) for s in run.recipe.seeds)]:
            losses.setdefault(method, []).append(measure(run, method, seed))
    table = [_row(run, method, cells, losses) for method, cells in losses.items()]
    if run.process.is_main_process:
        atomic.write_json(run.folder / "results.json", {"rows": [asdict(row) for row in table], "seeds": run.recipe.seeds})
        atomic.write_text(run.folder / "results.md", markdown(run, table))
    return table


def measure(run: Run, method: str, seed: int | None) -> dict[str, np.ndarray]:
    """Held-out loss of every test row of one arm, task → `[rows]`, kept in the run; the base model has no seed."""
    model = run.recipe.model
    adapter = None if seed is None else run.folder / "adapters" / method / f"seed-{seed}"
    made = trained(run, method, seed)["key"] if adapter else None
    tests = {name: config.fingerprint([*data["id"]]) for name, data in run.tests.items()}
    key = {"model": model.path, "max_length": model.max_length, "dtype": model.dtype, "adapter": made, "tests": tests}
    out = run.folder / "evaluation" / method / f"seed-{seed}.json" if adapter else run.folder / "evaluation" / "base.json"
    found: dict[str, Any] = {}

    def work() -> None:
        found.update(
            evaluate(
                out,
                key,
                model.path,
                str(adapter) if adapter else None,
                run.tests,
                dtype=model.dtype,
                max_length=model.max_length,
                batch_tokens=run.recipe.batch_tokens,
                tokens=run.store.tokens,
            )
        )

    run.main_first(work)
    if not found:
        work()
    return found


def trained(run: Run, method: str, seed: int | None) -> dict[str, Any]:
    """What is noted beside the adapter of one arm: its key, its result."""
    adapter = run.folder / "adapters" / method / f"seed-{seed}"
    return atomic.read_sealed(adapter / "train.json", f"delete {adapter} and run again")


def _row(run: Run, method: str, cells: Sequence[dict[str, np.ndarray]], losses: dict[str, list[dict[str, np.ndarray]]]) -> Row:
    tasks = list(run.tests)
    stacked = [np.stack([cell[task] for cell in cells]) for task in tasks]
    interval = bootstrap(stacked)
    per_seed = np.mean([values.mean(1) for values in stacked], axis=0)
    difference = None
    if method not in (BASE, RANDOM) and RANDOM in losses:
        other = [np.stack([cell[task] for cell in losses[RANDOM]]) for task in tasks]
        difference = bootstrap([a - b for a, b in zip(stacked, other, strict=True)])
    rows, tokens, select_seconds, train_seconds = _cost(run, method)
    return Row(
        method,
        rows,
        tokens,
        interval.mean,
        interval.low,
        interval.high,
        float(per_seed.std(ddof=1)) if len(cells) > 1 else None,
        *((difference.mean, difference.low, difference.high) if difference else (None, None, None)),
        {task: float(values.mean()) for task, values in zip(tasks, stacked, strict=True)},
        select_seconds,
        train_seconds,
    )


def _cost(run: Run, method: str) -> tuple[int, int, float | None, float | None]:
    """Rows and supervised tokens selected, seconds to select and to train (means over seeds)."""
    if method == BASE:
        return 0, 0, None, None
    cost = run.store[f"{TOKENS}.supervised"]
    found, seconds = list[tuple[int, int]](), list[float]()
    for seed in run.recipe.seeds:
        selection = chosen(run, method, seed)[1]
        found.append(
            (len(selection), int(cost[selection.indices].sum())) if selection else (len(cost), int(np.asarray(cost).sum()))
        )
        seconds.append(trained(run, method, seed)["result"]["seconds"])
    selecting = [v for k, v in account.seconds(run.folder, account.SELECTIONS).items() if k.split("/")[0] == method]
    mean = [float(np.mean(v)) if len(v) else None for v in (selecting, seconds)]
    rows, tokens = (round(float(v)) for v in np.mean(found, axis=0))
    return rows, tokens, mean[0], mean[1]


def verdict(run: Run, table: Sequence[Row]) -> str:
    """One line: which method won, and whether by more than the spread over seeds."""
    methods = [row for row in table if row.method in selecting(run)]
    if not methods:
        return "no method was measured"
    best = min(methods, key=lambda row: row.nll)
    random = next((row for row in methods if row.method == RANDOM), None)
    if random is None or best.method == RANDOM:
        return f"{best.method} has the lowest held-out loss ({best.nll:.3f})" + ("" if random is None else ": no method beat it")
    gain = random.nll - best.nll
    if best.sd is None or random.sd is None:
        return f"{best.method} won: {gain:.3f} nats below random; with one seed the spread is not known"
    spread = max(best.sd, random.sd)
    word = "larger than" if gain > spread else "within"
    return (
        f"{best.method} won: {gain:.3f} nats below random, {word} the spread over {len(run.recipe.seeds)} seeds (sd {spread:.3f})"
    )


def markdown(run: Run, table: Sequence[Row]) -> str:
    """The table, the verdict and how to repeat it."""
    tasks = list(run.tests)
    head = ["method", "rows", "tokens", "held-out NLL [95 %]", "sd over seeds", "Δ random [95 %]", *tasks, "select s", "train s"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(cells(row, tasks)) + " |" for row in table]
    trained = run.recipe.train.tokens
    note = f"Every arm trained on {trained:,} supervised tokens" if trained else "Every arm trained for one epoch"
    return "\n".join(
        [
            f"# {run.recipe.name}",
            "",
            *lines,
            "",
            verdict(run, table),
            "",
            f"{note}; seeds {run.recipe.seeds}; intervals: bootstrap over held-out rows, seeds averaged.",
            "",
        ]
    )


def cells(row: Row, tasks: Sequence[str]) -> list[str]:
    """A table row as text."""
    seconds = ["" if s is None else f"{s:.1f}" for s in (row.select_seconds, row.train_seconds)]
    difference = (
        "" if row.difference is None else f"{row.difference:+.3f} [{row.difference_low:+.3f}, {row.difference_high:+.3f}]"
    )
    return [
        row.method,
        f"{row.rows:,}" if row.rows else "",
        f"{row.tokens:,}" if row.tokens else "",
        f"{row.nll:.3f} [{row.low:.3f}, {row.high:.3f}]",
        "" if row.sd is None else f"{row.sd:.3f}",
        difference,
        *(f"{row.tasks[t]:.3f}" for t in tasks),
        *seconds,
    ]
