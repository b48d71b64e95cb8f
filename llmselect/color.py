"""The adapters of CoLoR-Filter: for each task one that has seen its target rows, and one that has seen as much of the pool."""

from __future__ import annotations

# datasets has no types.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
import logging
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmselect.errors import LlmselectError, UsageError
from llmselect.folds import Folds, Sharing, deal, folds_of, shared_rows
from llmselect.plain import is_mapping
from llmselect.selectors.random import Random
from llmselect.train import Train, finetune

if TYPE_CHECKING:
    from datasets import Dataset

    from llmselect.recipe import Recipe
    from llmselect.stages import Run

log = logging.getLogger("llmselect")
FEW = 8  # steps
ADAPTERS = PRIOR, CONDITIONAL = "prior", "conditional"


@dataclass(frozen=True)
class ColorTraining:
    """The `color:` section: for each task fine-tune an adapter on its target and one on random rows of the pool, for equal
    tokens."""

    train: Train = field(default_factory=Train, metadata={"help": "of all; train.epochs are those of a task's target"})
    tokens: int | None = field(default=None, metadata={"help": "supervised tokens of each; null: those epochs"})
    folds: int | None = field(
        default=None,
        metadata={"help": "conditional adapters of a task, each without a part of its target; null: 2 if the pool has its text"},
    )
    seed: int = 0

    def __post_init__(self) -> None:
        if self.train.tokens is not None:
            raise UsageError("color.train.tokens: give color.tokens instead, or train.epochs")
        for name in ("tokens", "folds"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UsageError(f"color.{name}: {getattr(self, name)} must be at least 1")


def color_stage(run: Run, tokens: Any) -> None:
    """Train the adapters of a run's `color:` section; `tokens` is the extractor of what its rows cost."""
    from llmselect.stages import TOKENS, extract

    model, settings = run.recipe.model, run.recipe.color
    assert settings is not None
    with run.timed("color"):
        extract(run.pool, run.store, {TOKENS: tokens}, target=run.target, shard_rows=run.recipe.shard_rows)
        cost, target_cost = (np.asarray(run.store[f"{name}.supervised"]) for name in (TOKENS, f"{TOKENS}@target"))
        groups: list[str] = [*run.target["group"]]
        for task in dict.fromkeys(groups):
            mine, out = np.flatnonzero(np.array(groups) == task), run.folder / "color" / task
            # What decontamination has left shares no text with any target.
            pool = run.pool.select([]) if run.recipe.pool.decontaminate else run.pool
            target = run.target.select(mine)
            run.main_first(lambda t=target, p=pool, o=out, n=task: plan_folds(p, t, o / CONDITIONAL, settings, n))
            adapters_of_task(run.pool, target, cost, target_cost[mine], out, settings,
                             model=model.path, dtype=model.dtype, max_length=model.max_length)  # fmt: skip


def plan_folds(pool: Dataset, target: Dataset, out: Path, settings: ColorTraining, task: str) -> None:
    """Decide how many adapters the target needs, and write `out/folds.json` where it is more than one.

    Args:
        pool: rows that may share text with the target.

    Errors: `UsageError` for more folds than the target can be cut into; `LlmselectError` when `out` holds other folds.
    """
    made = Folds.load(out)
    known = made.count if made else int((out / "train.json").exists())
    if known and settings.folds in (None, known):
        return
    if known:
        raise LlmselectError(f"{out} was trained with color.folds: {known}, now it is {settings.folds}; delete {out.parent}, "
                             "or give the run another out=")  # fmt: skip
    sharing = Sharing(target)
    shared = shared_rows(pool, sharing)
    parts = sharing.parts(target) if shared or settings.folds else np.zeros(0)
    count = settings.folds or (2 if shared and len(np.unique(parts)) > 1 else 1)
    told = f"color: {len(shared)} rows of the pool share text with target '{task}'"
    if count == 1:
        if shared:
            log.warning("%s and score too high by an adapter that has seen them (color.folds: %s); drop them with "
                        "pool.decontaminate: true%s", told, settings.folds,
                        ", or give color.folds: 2" if len(np.unique(parts)) > 1 else "")  # fmt: skip
        return
    try:
        fold = deal(parts, sharing.ids, count, settings.seed)
    except UsageError as error:
        raise UsageError(f"color.folds: target '{task}': {error}") from None
    folds, several = folds_of(sharing.ids, fold, shared)
    log.info("%s: each is scored by the one of %d adapters that has not seen its part of the target; %d share text with several "
             "parts and are scored as of the one they share most with", told, count, several)  # fmt: skip
    folds.save(out)


def adapters_of_task(pool: Dataset, target: Dataset, cost: np.ndarray, target_cost: np.ndarray, out: Path,
                     settings: ColorTraining, *, model: str, dtype: str, max_length: int | None) -> None:  # fmt: skip
    """Train `out/prior` and `out/conditional`, or `out/conditional/fold-k` where that has folds; what is there from the same
    rows and settings stays.

    All see the same number of supervised tokens: `settings.tokens`, or `epochs` of the whole target. The prior's rows are random
    ones with at most the tokens of the target, repeated as often; a fold's adapter repeats the rest of the target.

    Args:
        target: the rows of one task.
        cost, target_cost: supervised tokens of each row.
    """
    own = int(target_cost.sum())
    train = replace(settings.train, tokens=settings.tokens or own * settings.train.epochs, epochs=1)
    chosen = Random().select({"tokens": max(own, int(cost.max()))}, seed=settings.seed, ids=pool["id"], cost=cost)
    trainings = [(out / PRIOR, f"random (CoLoR-Filter, {PRIOR})", chosen.to_dataset(pool))]
    if (folds := Folds.load(out / CONDITIONAL)) is None:
        trainings.append((out / CONDITIONAL, f"the target (CoLoR-Filter, {CONDITIONAL})", target))
    else:
        ids: list[str] = [*target["id"]]
        fold = np.array([folds.of[row_id] for row_id in ids])
        for k, place in enumerate(folds.places(out / CONDITIONAL)):
            about = f"the target without fold {k} of {folds.count} (CoLoR-Filter, {CONDITIONAL})"
            trainings.append((place, about, target.select(np.flatnonzero(fold != k))))
    for place, about, rows in trainings:
        made = finetune(rows, model, place, train, seed=settings.seed, dtype=dtype, max_length=max_length,
                        provenance={"selector": about, "rows": len(rows)})  # fmt: skip
        if made.steps < FEW:
            log.warning("color: %s is trained for %d steps (%d supervised tokens): its losses hardly differ from the base's; "
                        "give color.train more epochs or fewer batch_tokens", place, made.steps, made.tokens)  # fmt: skip


def with_adapters(extractor: Any, recipe: Recipe) -> Any:
    """An extractor whose `trained` adapters are the folders of the recipe's `color:` section; folders by task come in the order
    of its targets."""
    own: dict[str, Any] = {}
    for key in ADAPTERS:
        given = getattr(extractor, key, None)
        if given == "trained" and recipe.color:
            own[key] = {task: str(recipe.folder / "color" / task / key) for task in recipe.targets}
        elif is_mapping(given):
            own[key] = {task: given[task] for task in sorted(given, key=[*recipe.targets, *given].index)}
    return replace(extractor, **own)


def check_adapters(extractor: Any, recipe: Recipe, name: str) -> None:
    """Errors: `UsageError` when feature `name` wants adapters that nobody trains, or has folders for other tasks."""
    for key in ADAPTERS:
        given = getattr(extractor, key, None)
        if given == "trained":
            raise UsageError(f"features.{name}: adapters 'trained' need a color: section; or give folders")
        if is_mapping(given) and set(given) != set(recipe.targets):
            raise UsageError(f"features.{name}.{key}: folders for {list(given)}; give one for each of the targets "
                             f"{list(recipe.targets)}, or one for all")  # fmt: skip
