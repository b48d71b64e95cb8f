"""What a run will take before it starts: rows, bytes, minutes, from a measured sample."""

from __future__ import annotations

# datasets has no types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from llmselect import account
from llmselect.engine.progress import duration
from llmselect.prepare import check_budgets, prepare
from llmselect.recipe import Recipe
from llmselect.selection import Budget, Selection
from llmselect.stages import TOKENS, Run
from llmselect.token_cache import ROW_BYTES, TOKEN_BYTES

SAMPLE = 512  # pool rows read and passed to measure speed
FORWARD_ROWS = 128
FEW = 16  # of them for a feature of which a row costs many passes


def estimate(recipe: Recipe) -> dict[str, Any]:
    """Rows, bytes of features and minutes of each stage, measured on the first rows of the pool on this machine.

    Nothing is written to the run folder.
    """
    with tempfile.TemporaryDirectory(prefix="llmselect-dry-run-") as scratch:
        new = count_rows(recipe)
        total = new + (len(Selection.load(recipe.pool.memory)) if recipe.pool.memory else 0)
        sample = replace(recipe, out=scratch, pool=replace(recipe.pool, limit=min(new, SAMPLE), memory=None))
        run = Run(sample)
        prepare(run)
        share = len(run.pool) / min(new, SAMPLE)
        rows = int(total * share)
        check_budgets(recipe, rows)
        costly = _costly(run)
        run.recipe = replace(run.recipe, features={k: v for k, v in run.recipe.features.items() if k not in costly})
        seconds, bytes_per_row, tokens_per_row = _passes(run)
        length = float(np.asarray(run.store[f"{TOKENS}.total"]).mean())
        step = 3 * _forward(run)  # forward and backward
        # Target rows are passed like rows of the pool: nothing beside n single passes, much where a row costs many.
        many = {name: round(each * (rows + len(run.target)) / 60, 2) for name, (each, _) in costly.items()}
        bytes_per_row += sum(size for _, size in costly.values())
    budget = Budget.parse(recipe.budget)
    selected = budget.rows_of(rows) if budget.tokens is None else int(budget.tokens / max(1.0, tokens_per_row))
    trainings = (len(recipe.methods) + recipe.full + (recipe.refine is not None)) * len(recipe.seeds)
    trained = recipe.train.tokens or int(selected * tokens_per_row * recipe.train.epochs)
    return {
        "pool_rows": total,
        "usable_rows": rows,
        "selected_rows": selected,
        "feature_bytes": int(bytes_per_row * rows),
        "token_bytes": int((ROW_BYTES + TOKEN_BYTES * length) * rows),
        "extract_minutes": round(seconds * rows / 60 + sum(many.values()), 2),
        "costly_minutes": many,
        "trainings": trainings,
        "tokens_per_training": trained,
        "train_minutes": round(step * trained / max(1.0, tokens_per_row) * trainings / 60, 2),
        "note": f"speed measured on {min(new, SAMPLE)} rows here; training taken as 3 × the cost of a forward pass",
    }


def count_rows(recipe: Recipe) -> int:
    """Rows of the pool without its memory: counted without building them."""
    from llmselect.readers import read

    limit, count = recipe.pool.limit or float("inf"), 0
    for _ in read(recipe.pool.path, recipe.pool.split, recipe.pool.max_row_bytes, recipe.pool.subset):
        count += 1
        if count >= limit:
            break
    return count


def _passes(run: Run) -> tuple[float, float, float]:
    """Seconds and bytes per row of all features, and supervised tokens per row."""
    from llmselect.stages import extract_stage

    run.recipe = replace(
        run.recipe,
        warmup=_short_warm_up(run.recipe),
        features={name: {k: v for k, v in one.items() if k != "adapter"} | _any_sae(one)
                  for name, one in run.recipe.features.items()},
        color=run.recipe.color and replace(run.recipe.color, tokens=1),
        sae=run.recipe.sae and replace(run.recipe.sae, tokens=1, held_out_rows=1),
    )  # fmt: skip
    start = time.monotonic()
    extract_stage(run)
    told = account.seconds(run.folder, account.STAGES)
    seconds = time.monotonic() - start - told.get("warmup", 0.0) - told.get("color", 0.0)
    size = sum(f.stat().st_size for f in Path(run.store.path).glob("[!.]*/*.safetensors") if "@target" not in str(f))
    tokens = float(np.asarray(run.store[f"{TOKENS}.supervised"]).mean())
    return seconds / len(run.pool), size / len(run.pool), tokens


def _forward(run: Run) -> float:
    """Seconds per row of a plain forward pass, without those of loading the model."""
    from llmselect.evaluate import row_losses

    model, took = run.recipe.model, list[float]()
    sizes = [1, min(len(run.pool), FORWARD_ROWS)]
    for rows in sizes:
        start = time.monotonic()
        row_losses(model.path, None, {"pool": run.pool.select(range(rows))}, dtype=model.dtype, max_length=model.max_length)
        took.append(time.monotonic() - start)
    return max(0.0, took[1] - took[0]) / max(1, sizes[1] - 1)


def _costly(run: Run) -> dict[str, tuple[float, float]]:
    """Seconds and bytes per row of the features of which a row costs many passes, measured on a few rows."""
    from llmselect.engine.backbone import Backbone
    from llmselect.engine.extraction import groups_of
    from llmselect.engine.passes import Pass, default_batch_tokens, fit

    found = dict[str, tuple[float, float]]()
    few = run.pool.select(np.unique(np.linspace(0, len(run.pool) - 1, FEW).astype(int)))
    for name in run.recipe.features:
        one = run.recipe.extractor(name)
        if not one.costly or run.recipe.lazy(name):
            continue
        backbone = Backbone(one.model, None if one.adapter == "warmup" else one.adapter, one.dtype, one.max_length)
        passing = Pass(backbone, {name: one}, {}, {}, groups_of(run.target), run.recipe.batch_tokens or default_batch_tokens())
        fit(passing, run.target, run.pool)
        some: dict[str, Any] = few[:]
        start = time.monotonic()
        made = passing.compute(some["messages"], some["id"], [name])[name]
        size = sum(array.nbytes for array in made.values())
        found[name] = (time.monotonic() - start) / len(few), size / len(few)
    return found


def _short_warm_up(recipe: Recipe) -> Any:
    """As many checkpoints as the recipe's warm-up leaves, from a few rows: gradient features are made at each."""
    if recipe.warmup is None or not any(
        getattr(recipe.extractor(name), "checkpoints", None) == "warmup" for name in recipe.features
    ):
        return None
    train = replace(recipe.warmup.train, batch_tokens=64)
    return replace(recipe.warmup, budget={"rows": 4}, train=train)


def _any_sae(feature: dict[str, Any]) -> dict[str, Any]:
    """An SAE of one step explains nothing, and costs the same to read."""
    return {"max_fvu": None} if feature.get("extractor") == "sae" else {}


def text(found: dict[str, Any], recipe: Recipe) -> str:
    """The estimate for a person."""
    extracting, training = (duration(60 * found[f"{stage}_minutes"]) for stage in ("extract", "train"))
    return "\n".join(
        [
            f"{recipe.name}: nothing was run; this is what to expect on this machine",
            f"  pool      {found['pool_rows']:,} rows, about {found['usable_rows']:,} usable",
            f"            their tokens, kept: {found['token_bytes'] / 1e6:,.1f} MB",
            f"  extract   {len(recipe.features)} features, {found['feature_bytes'] / 1e6:,.1f} MB, {extracting}",
            *(
                f"            of it {name}: {duration(60 * m)}, measured on {FEW} rows"
                for name, m in found["costly_minutes"].items()
            ),
            f"  select    {len(recipe.methods)} methods × {len(recipe.seeds)} seeds, {found['selected_rows']:,} rows each",
            *(["  refine    its rounds are not counted here; llmselect refine --dry-run tells them"] if recipe.refine else []),
            f"  train     {found['trainings']} adapters × {found['tokens_per_training']:,} tokens, {training}",
            f"  ({found['note']})",
        ]
    )
