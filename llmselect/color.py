"""The two adapters of CoLoR-Filter: one that has seen the target, one that has seen as much of the pool."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmselect.errors import UsageError
from llmselect.selectors.random import Random
from llmselect.train import Train, finetune

if TYPE_CHECKING:
    from datasets import Dataset

    from llmselect.stages import Run

ADAPTERS = ("prior", "conditional")


@dataclass(frozen=True)
class ColorTraining:
    """The `color:` section: fine-tune an adapter on the target and one on random rows of the pool, for equal tokens."""

    train: Train = field(default_factory=Train, metadata={"help": "of both; train.epochs are those of the target"})
    tokens: int | None = field(default=None, metadata={"help": "supervised tokens of each; null: the epochs of the target"})
    seed: int = 0

    def __post_init__(self) -> None:
        if self.train.tokens is not None:
            raise UsageError("color.train.tokens: give color.tokens instead, or train.epochs")
        if self.tokens is not None and self.tokens < 1:
            raise UsageError(f"color.tokens: {self.tokens} must be at least 1")


def color_stage(run: Run, tokens: Any) -> None:
    """Train the adapters of a run's `color:` section; `tokens` is the extractor of what its rows cost."""
    from llmselect.stages import TOKENS, extract

    model, settings = run.recipe.model, run.recipe.color
    assert settings is not None
    with run.timed("color"):
        extract(run.pool, run.store, {TOKENS: tokens}, target=run.target, shard_rows=run.recipe.shard_rows)
        cost, target_cost = (np.asarray(run.store[f"{name}.supervised"]) for name in (TOKENS, f"{TOKENS}@target"))
        two_adapters(run.pool, run.target, cost, target_cost, run.folder / "color", settings,
                     model=model.path, dtype=model.dtype, max_length=model.max_length)  # fmt: skip


def two_adapters(pool: Dataset, target: Dataset, cost: np.ndarray, target_cost: np.ndarray, out: Path, settings: ColorTraining,
                 *, model: str, dtype: str, max_length: int | None) -> None:  # fmt: skip
    """Train `out/prior` and `out/conditional`; what is there from the same rows and settings stays.

    Args:
        cost, target_cost: supervised tokens of each row. The prior's rows are random ones with at most the tokens of the target.
    """
    own = int(target_cost.sum())
    train = replace(settings.train, tokens=settings.tokens or own * settings.train.epochs, epochs=1)
    chosen = Random().select({"tokens": max(own, int(cost.max()))}, seed=settings.seed, ids=pool["id"], cost=cost)
    shared: dict[str, Any] = {"seed": settings.seed, "dtype": dtype, "max_length": max_length}
    for name, rows in zip(ADAPTERS, (chosen.to_dataset(pool), target), strict=True):
        about = {"selector": f"{'random' if name == 'prior' else 'the target'} (CoLoR-Filter, {name})", "rows": len(rows)}
        finetune(rows, model, out / name, train, provenance=about, **shared)
