"""The stages of a run: prepare · extract · select · train · evaluate. The only module that knows recipes and folders.

A run folder explains and repeats itself::

    config.yaml  versions.json  rows.json (the account of every row)  quarantine.jsonl
    pool/  targets/  tests/     the rows used, as Arrow files
    features/                   the FeatureStore; features/.tokens, the rows' tokens, made once
    clusters/                   those that methods take as groups
    selections/<method>/seed-<s>/
    adapters/<method>/seed-<s>/
    evaluation/<method>/seed-<s>.json  results.json  results.md  timings.json

Every stage skips what is complete, so running again continues.
"""

from __future__ import annotations

# datasets and accelerate have no types.
# pyright: reportMissingTypeStubs=false
import json
import logging
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmselect import account, config
from llmselect.array_views import Columns
from llmselect.clustering import clusters_for
from llmselect.color import color_stage
from llmselect.errors import LlmselectError, UsageError
from llmselect.memory import REMEMBERED, of_memory, seed_of
from llmselect.mixing import select_within
from llmselect.prepare import semantic_duplicates, set_aside, shared_strings
from llmselect.recipe import Recipe, features_in
from llmselect.selection import Budget, Selection
from llmselect.selectors._base import OF_TARGET, inputs_of
from llmselect.store import FeatureStore
from llmselect.tasks import Tasks, tasks_of

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger("llmselect")
TOKENS = "tokens"  # the feature that every run has: what rows cost


def extract(pool: Dataset, store: FeatureStore, extractors: Mapping[str, Any], **options: Any) -> FeatureStore:
    """Compute features of pool and target rows; see `llmselect.engine.extraction.extract`."""
    from llmselect.engine import extraction

    return extraction.extract(pool, store, extractors, **options)


@dataclass
class Run:
    """One recipe in its folder."""

    recipe: Recipe
    _lazy: dict[str, Any] = field(default_factory=dict[str, Any])

    @property
    def folder(self) -> Path:
        return self.recipe.folder

    @cached_property
    def process(self) -> Any:
        """This process among those launched together."""
        import torch
        from accelerate import PartialState

        # The others wait while the first reads the pool or selects, which may take hours; torch's patience is ten minutes.
        return PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=2))

    @cached_property
    def store(self) -> FeatureStore:
        return FeatureStore(self.folder / "features")

    @cached_property
    def target(self) -> Dataset:
        """The dev rows of all tasks, with their group."""
        from datasets import concatenate_datasets

        return concatenate_datasets([self.opened(f"targets/{name}") for name in self.recipe.targets])

    @cached_property
    def tests(self) -> dict[str, Dataset]:
        """The held-out rows of the tasks that have some."""
        return {name: self.opened(f"tests/{name}") for name, t in self.recipe.targets.items() if t.test}

    @cached_property
    def pool(self) -> Dataset:
        """The rows that may be selected: kept when read, and with a response that fits into `max_length`."""
        rows = np.load(account.intact(self.folder, "pool/usable.npy"), allow_pickle=False)
        data: Any = self.opened("pool")
        return data if len(rows) == len(data) else data.select(rows)

    def array(self, read: Any, tasks: Tasks | None = None) -> Any:
        """The pool side of a feature, whole or computed on demand, or of several side by side; of some `tasks` only, where
        its columns are those of target groups."""
        name, *more = features_in(read)
        if more:
            return Columns([self.array(one, tasks) for one in (name, *more)])
        found = self._on_demand(name) if self.recipe.lazy(name) else self.store[name]
        by_group = self.recipe.extractor(name.partition(".")[0]).by_group
        return found if tasks is None or not by_group else tasks.pool_side(found)

    def _on_demand(self, name: str) -> Any:
        from llmselect.engine.on_demand import lazy

        if name not in self._lazy:
            warmup = str(self.folder / "warmup") if self.recipe.warmup else None
            made = self.recipe.extractor(name.partition(".")[0], warmup)
            self._lazy[name] = lazy(self.pool, self.store, name, made, target=self.target, batch_tokens=self.recipe.batch_tokens)
        return self._lazy[name]

    def opened(self, place: str) -> Dataset:
        """The rows in a folder of the run."""
        from llmselect.pool import open_rows

        return open_rows(account.intact(self.folder, f"{place}/pool.arrow"))

    @contextmanager
    def timed(self, name: str) -> Generator[None]:
        """Add the seconds of a block to `timings.json`, over all launches."""
        start = time.monotonic()
        yield
        if self.process.is_main_process:
            before = account.seconds(self.folder, account.STAGES).get(name, 0.0)
            account.took(self.folder, account.STAGES, name, before + time.monotonic() - start)

    def main_first(self, work: Any) -> None:
        """Do `work` on the main process while the others wait, so that files are written once."""
        if self.process.is_main_process:
            work()
        self.process.wait_for_everyone()


def extract_stage(run: Run) -> None:
    """Every feature of the recipe, plus token counts, on pool and targets."""
    warmup = _warm_up(run) if run.recipe.warmup else None
    made = {name: run.recipe.extractor(name, warmup) for name in run.recipe.features if not run.recipe.lazy(name)}
    made = {TOKENS: _tokens(run), **made}
    if run.recipe.color:
        color_stage(run, made[TOKENS])
    if run.recipe.sae:
        run.main_first(lambda: sae_stage(run))
    with run.timed("extract"):
        extract(run.pool, run.store, made, target=run.target, batch_tokens=run.recipe.batch_tokens,
                shard_rows=run.recipe.shard_rows)  # fmt: skip
    run.main_first(lambda: set_aside(run, list(made)))


def sae_stage(run: Run) -> Any:
    """Train the SAE of the recipe's `sae:` section on the pool."""
    from llmselect.engine.backbone import Backbone
    from llmselect.sae.training import train_sae

    model = run.recipe.model
    assert run.recipe.sae is not None
    backbone = Backbone(model.path, None, model.dtype, model.max_length, tokens=run.store.tokens)
    with run.timed("sae"):
        return train_sae(run.pool, backbone, run.folder / "sae", run.recipe.sae)


def _tokens(run: Run) -> Any:
    from llmselect.extractors.tokens import Tokens

    return Tokens(model=run.recipe.model.path, dtype=run.recipe.model.dtype, max_length=run.recipe.model.max_length)


def _warm_up(run: Run) -> str:
    """Fine-tune on a random part of the pool (TRIM, section 4.1; LESS, section 3)."""
    from llmselect.selectors.random import Random
    from llmselect.train import finetune

    warmup, model, cost = run.recipe.warmup, run.recipe.model, None
    assert warmup is not None
    if Budget.parse(warmup.budget).tokens is not None:
        extract(run.pool, run.store, {TOKENS: _tokens(run)}, target=run.target, shard_rows=run.recipe.shard_rows)
        cost = np.asarray(run.store[f"{TOKENS}.supervised"])
    chosen = Random().select(warmup.budget, seed=warmup.seed, ids=run.pool["id"], cost=cost)
    out = run.folder / "warmup"
    with run.timed("warmup"):
        finetune(chosen.to_dataset(run.pool), model.path, out, warmup.train, seed=warmup.seed, dtype=model.dtype,
                 max_length=model.max_length, provenance={"selector": "random (warm-up)", "rows": len(chosen)},
                 tokens=run.store.tokens)  # fmt: skip
    return str(out)


def select_stage(run: Run) -> None:
    """One selection per method and seed."""
    for method in run.recipe.methods:
        lazy = any(run.recipe.lazy(name) for read in run.recipe.selector(method)[1].values() for name in features_in(read))
        for seed in run.recipe.seeds:
            if lazy:  # every process computes its share of the rows asked for
                _select(run, method, seed)
                run.process.wait_for_everyone()
            else:
                run.main_first(lambda method=method, seed=seed: _select(run, method, seed))


def _key(run: Run, method: str, seed: int, arrays: Mapping[str, Any]) -> dict[str, Any]:
    """What a selection follows from."""
    selector, reads = run.recipe.selector(method)
    specs = {key: {k: v for k, v in array.spec.items() if k != "part"} for key, array in arrays.items()}
    key = {"selector": selector.name, "config": config.to_dict(selector), "seed": seed, "reads": reads,
           "budget": Budget.parse(run.recipe.budget_of(method)).plain()}  # fmt: skip
    if grouping := run.recipe.grouping_of(method):
        specs["groups"] = dict(run.store.open(grouping.x.partition(".")[0]).spec)
        key["groups"] = config.to_dict(grouping)
    if limits := run.recipe.limits_of(method):
        key["limits"] = config.to_dict(limits)
    if tasks := run.recipe.tasks_of(method):
        key["tasks"] = tasks
    if run.recipe.dedup is not None:
        key["dedup"] = config.to_dict(run.recipe.dedup)
    return {**key, "features": config.fingerprint(specs)}


def _select(run: Run, method: str, seed: int) -> None:
    out = run.folder / "selections" / method / f"seed-{seed}"
    selector, reads = run.recipe.selector(method)
    limits, dropped, tasks = run.recipe.limits_of(method), semantic_duplicates(run), tasks_of(run, method)
    arrays: dict[str, Any] = {key: run.array(read, tasks) for key, read in reads.items()}
    key = _key(run, method, seed, arrays)
    if (out / "selection.json").exists():
        if lines := config.difference(Selection.load(out).provenance["key"], json.loads(json.dumps(key))):
            raise LlmselectError(f"{out} was selected otherwise:\n  " + "\n  ".join(lines)
                                 + "\nDelete it, or give the run another out=.")  # fmt: skip
        return
    start = time.monotonic()
    inputs: dict[str, Any] = {
        "seed": seed_of(run, seed), "ids": run.store.open(TOKENS).ids,
        "cost": np.asarray(run.store[f"{TOKENS}.supervised"]),
        "exclude": dropped,
        **_inputs(run, type(selector), reads, arrays, tasks),
        **clusters_for(run, run.recipe.grouping_of(method), dropped),
    }
    try:
        if limits is None:
            made = selector.select(run.recipe.budget_of(method), **inputs)
        else:
            target: Any = run.target
            of_target = np.asarray(target["group"])
            of_target = of_target if tasks is None else tasks.target_side(of_target)
            inputs |= {"groups": shared_strings(run.pool, "source"), "target_groups": of_target}
            made = select_within(selector, run.recipe.budget_of(method), limits, **inputs)
    except UsageError as error:
        raise UsageError(f"methods.{method}: {error}") from error
    several = len(features_in(reads.get("x", "")))
    evidence = tasks.evidence(made.evidence, selector.name, several) if tasks else made.evidence
    evidence = {**evidence, **_more_evidence(run, reads, made)}
    seconds, provenance = time.monotonic() - start, {**made.provenance, "key": key, "method": method}
    if not run.process.is_main_process:
        return
    account.took(run.folder, account.SELECTIONS, f"{method}/seed-{seed}", seconds)  # first: a kill after it selects again
    Selection(made.indices, made.n, made.scores, made.weights, evidence, made.nested, provenance, made.ids).save(out)


def _inputs(run: Run, selector: type, reads: Mapping[str, Any], arrays: dict[str, Any], tasks: Tasks | None) -> dict[str, Any]:
    """The arrays that a selector's hook asks for, from features, pool and targets, on the side of the targets of `tasks`."""
    wanted, found = inputs_of(selector), dict(arrays)
    if "groups" in wanted:
        found["groups"] = shared_strings(run.pool, "source")
    if "target" in wanted and "x" in reads:
        parts = [name.partition(".") for name in features_in(reads["x"])]
        sides = [run.store[f"{feature}@target{dot}{array}"] for feature, dot, array in parts]
        found["target"] = sides[0] if len(sides) == 1 else Columns(sides)
    if "target_groups" in wanted:
        target: Any = run.target
        found["target_groups"] = np.asarray(target["group"])
    if "target_cost" in wanted:
        found["target_cost"] = np.asarray(run.store[f"{TOKENS}@target.supervised"])
    if tasks is not None:
        found |= {key: tasks.target_side(found[key]) for key in OF_TARGET if key in found}
    return found


def _more_evidence(run: Run, reads: Mapping[str, Any], made: Selection) -> dict[str, np.ndarray]:
    """Why each row was picked, where a feature tells: arrays `top_…` of the selected rows; and whether it is of a memory."""
    old = of_memory(run)
    found: dict[str, np.ndarray] = {} if old is None else {REMEMBERED: old[made.indices]}
    for name in (one for read in reads.values() for one in features_in(read)):
        feature = name.partition(".")[0]
        if run.recipe.lazy(feature):
            continue
        tops = [one for one in run.store.open(feature).spec["arrays"] if one.startswith("top_")]
        found |= {one: run.store[f"{feature}.{one}"][made.indices] for one in tops}
    return found
