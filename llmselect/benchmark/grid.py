"""Grid: models × sets of targets × methods × budgets × seeds as one strict YAML file, and its cells."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llmselect import config
from llmselect.clustering import Clustering
from llmselect.color import ADAPTERS, ColorTraining
from llmselect.errors import UsageError, nearest
from llmselect.plain import is_list, is_mapping
from llmselect.recipe import Model, PoolSource, Recipe, TargetSource, Warmup, features_in
from llmselect.sae.training import SaeTraining
from llmselect.selection import Budget
from llmselect.semdedup import Dedup
from llmselect.sources import identity
from llmselect.tasks import aimed
from llmselect.train import Train

BASE, FULL = "base", "full"
BASELINES: dict[str, dict[str, Any]] = {name: {"selector": name} for name in ("random", "balanced", "random_matched")}
EVERYTHING, NOTHING = "100%", "0%"
_ALL = Budget(fraction=1.0)
SECTIONS = ("warmup", "sae", "color")  # what is trained before features are extracted, where one needs it


@dataclass(frozen=True)
class Grid:
    """The benchmark's YAML. The three random baselines join every grid, at every budget."""

    name: str
    models: dict[str, Model]
    pool: PoolSource
    tasks: dict[str, TargetSource] = field(metadata={"help": "dev and test rows by name; test is needed"})
    methods: dict[str, dict[str, Any]] = field(metadata={"help": "as in a recipe, and budgets: [...] of a method's own"})
    targets: dict[str, list[str]] | None = field(default=None, metadata={"help": "sets of tasks; null: each task alone"})
    features: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    budgets: list[Any] = field(default_factory=lambda: ["5%"])
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    train: Train = field(default_factory=Train)
    full: bool = field(default=True, metadata={"help": "also train on the whole pool"})
    dedup: Dedup | None = None
    warmup: Warmup | None = None
    sae: SaeTraining | None = None
    color: ColorTraining | None = None
    batch_tokens: int | None = None
    shard_rows: int = 1024
    keep: bool = field(default=False, metadata={"help": "keep the adapter of a finished cell"})
    cells: str | None = field(default=None, metadata={"help": "folder of results; null: cells/<name> beside the file"})
    out: str | None = field(default=None, metadata={"help": "folder of features and adapters; null: runs/<name>"})
    vars: dict[str, Any] = field(default_factory=dict[str, Any], metadata={"help": "values for ${name} in this file"})

    def __post_init__(self) -> None:
        for name in ("models", "tasks", "methods", "budgets", "seeds"):
            if not getattr(self, name):
                raise UsageError(f"{name}: at least one is needed")
        if self.train.tokens is None:
            raise UsageError("train.tokens: a benchmark trains every arm for the same tokens; give it, e.g. train.tokens=30000")
        for kind, names in (("models", self.models), ("tasks", self.tasks), ("targets", self.targets or {})):
            for name in names:
                if not name or not all(c.isalnum() or c in "_+-" for c in name):
                    raise UsageError(f"{kind}.{name}: not a name; allowed: letters, digits, '_', '+', '-'")
        for name, tasks in self.sets.items():
            for task in tasks or [""]:
                if task not in self.tasks:
                    known = list(self.tasks)
                    raise UsageError(f"targets.{name}: no task '{task}'.{nearest(task, known)} There are: {known}")
        for name, task in self.tasks.items():
            if task.test is None:
                raise UsageError(f"tasks.{name}.test: missing; a benchmark measures on held-out rows")

    @property
    def sets(self) -> dict[str, list[str]]:
        """The sets of tasks that rows are selected for."""
        return {name: [name] for name in self.tasks} if self.targets is None else self.targets

    def arms(self) -> dict[str, tuple[dict[str, Any], list[Budget]]]:
        """Method → its options and budgets, the baselines first."""
        found, used = dict[str, tuple[dict[str, Any], list[Budget]]](), set[Budget]()
        for name, options in self.methods.items():
            given = options.get("budgets", self.budgets)
            if name in (BASE, FULL):
                raise UsageError(f"methods.{name}: this name is kept for the model before and after all data; give another")
            if not is_list(given) or not given or "budget" in options:
                raise UsageError(f"methods.{name}.budgets: give a list, e.g. [1%, 5%], and no budget:")
            try:
                budgets = list(dict.fromkeys(Budget.parse(one) for one in given))
            except UsageError as error:
                raise UsageError(f"methods.{name}.budgets: {error}") from None
            found[name] = ({k: v for k, v in options.items() if k != "budgets"}, budgets)
            used |= {*budgets}
        # At 100 % nothing is left to chance: a method that stops by itself is compared with the nearest size.
        shared = sorted(used - {_ALL}, key=str) or [_ALL]
        for name, options in BASELINES.items():
            if name in found and found[name][0] != options:
                raise UsageError(f"methods.{name}: this name is kept for the baseline {options}; give yours another")
        return {**{name: (options, shared) for name, options in BASELINES.items()},
                **{name: one for name, one in found.items() if name not in BASELINES}}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One measurement; `base` has budget 0 % and seed 0, `full` budget 100 %."""

    model: str
    target: str
    method: str
    budget: str
    seed: int

    @property
    def path(self) -> Path:
        """The file of the cell below the folder of results."""
        return Path(self.model) / self.target / self.method / f"{slug(self.budget)}-seed-{self.seed}.json"

    def __str__(self) -> str:
        return f"{self.model} {self.target} {self.method} {self.budget} seed {self.seed}"


@dataclass(frozen=True)
class Plan:
    """A grid, and where its file lies."""

    grid: Grid
    home: Path
    _aimed: dict[str, bool] = field(default_factory=dict[str, bool])

    @property
    def results(self) -> Path:
        """Folder of the cells' files."""
        return Path(self.grid.cells) if self.grid.cells else self.home / "cells" / self.grid.name

    @property
    def folder(self) -> Path:
        """Folder of features, selections, adapters and claims."""
        return Path(self.grid.out or f"runs/{self.grid.name}")

    def cells(self, only: Mapping[str, set[str]] | None = None) -> list[Cell]:
        """All cells, those of one model and target set together, the baselines first in each; `only` from `parse_only`."""
        found = list[Cell]()
        for model in self.grid.models:
            for target in self.grid.sets:
                found.append(Cell(model, target, BASE, NOTHING, 0))
                for method, (_, budgets) in self.grid.arms().items():
                    found += [Cell(model, target, method, label(b), s) for b in budgets for s in self.grid.seeds]
                if self.grid.full:
                    found += [Cell(model, target, FULL, EVERYTHING, seed) for seed in self.grid.seeds]
        return [c for c in found if all(str(getattr(c, key)) in wanted for key, wanted in (only or {}).items())]

    def recipe(self, model: str) -> Recipe:
        """The recipe of one model, which every cell of it is a part of: all tasks, and a method per arm."""
        grid, methods = self.grid, dict[str, dict[str, Any]]()
        plain = Recipe(
            name=f"{grid.name}-{model}", model=grid.models[model], pool=grid.pool, targets=grid.tasks, features=grid.features,
            seeds=list(grid.seeds), train=grid.train, full=False, dedup=grid.dedup, warmup=grid.warmup, sae=grid.sae,
            color=grid.color, batch_tokens=grid.batch_tokens, shard_rows=grid.shard_rows, out=str(self.folder / model),
            methods={},
        )  # fmt: skip
        for method, (options, budgets) in grid.arms().items():
            for target, tasks in grid.sets.items():
                part = {"tasks": tasks} if self.aimed(method) else {}
                methods |= {self.arm(method, label(b), target): {**options, **part, "budget": b.plain()} for b in budgets}
        return replace(plain, methods=methods)

    def arm(self, method: str, budget: str, target: str) -> str:
        """The name of what is selected and trained for a cell: one for all targets where the method looks at none."""
        if method in (BASE, FULL):
            return method
        return f"{method}-{slug(budget)}" + (f"-{target}" if self.aimed(method) else "")

    def arm_of(self, cell: Cell) -> str:
        """The arm that a cell measures."""
        return self.arm(cell.method, cell.budget, cell.target)

    def aimed(self, method: str) -> bool:
        """Whether a method selects other rows for another target."""
        if method in (BASE, FULL):
            return False
        if method not in self._aimed:
            grid = self.grid
            recipe = Recipe("", next(iter(grid.models.values())), grid.pool, {}, {method: grid.arms()[method][0]}, grid.features)
            self._aimed[method] = aimed(recipe, method)
        return self._aimed[method]

    def reads(self, method: str) -> list[str]:
        """The features that a method reads, its clusters' among them."""
        if method in (BASE, FULL):
            return []
        options = self.grid.arms()[method][0]
        named = [one for key in ("x", "quality") if key in options for one in features_in(options[key])]
        if grouping := Clustering.parse(options.get("groups"), f"methods.{method}.groups"):
            named.append(grouping.x)
        return list(dict.fromkeys(one.partition(".")[0] for one in named))

    def key(self, cell: Cell) -> dict[str, Any]:
        """What the numbers of a cell follow from; paths are told as the file writes them, whatever the machine."""
        grid, made = self.grid, {"model": config.to_dict(self.grid.models[cell.model])}
        made["pool"] = identity(grid.pool)
        # Of all tasks: the pool holds no text of any of their test rows.
        made["tasks"] = {name: identity(one) for name, one in grid.tasks.items()}
        made["target"] = grid.sets[cell.target]
        if cell.method != BASE:
            made |= {"train": config.to_dict(grid.train), "seed": cell.seed}
        if cell.method not in (BASE, FULL):
            used = {name: grid.features[name] for name in self.reads(cell.method)}
            made |= {"method": grid.arms()[cell.method][0], "budget": cell.budget, "features": used}
            made |= {"dedup": config.to_dict(grid.dedup)} if grid.dedup else {}
            for section in SECTIONS:
                if (value := getattr(grid, section)) and any(needs(options, section) for options in used.values()):
                    made[section] = config.to_dict(value)
        return self._portable(made)

    def _portable(self, value: Any) -> Any:
        if is_mapping(value):
            return {key: self._portable(one) for key, one in value.items()}
        if is_list(value):
            return [self._portable(one) for one in value]
        if not isinstance(value, str):
            return value
        places = {v: k for k, v in self.grid.vars.items() if isinstance(v, str) and v}
        for place in sorted(places, key=len, reverse=True):
            if value == place or value.startswith(place.rstrip("/") + "/"):
                return "${" + places[place] + "}" + value[len(place.rstrip("/")) :]
        return os.path.relpath(value, self.home) if Path(value).is_absolute() else value


def needs(feature: Mapping[str, Any], section: str) -> bool:
    """Whether a feature reads what a section of the grid trains: `warmup`, `sae`, `color`."""
    if section == "warmup":
        return "warmup" in (feature.get("adapter"), feature.get("checkpoints"))
    reads = {"sae": ("sae",), "color": ADAPTERS}[section]
    return feature.get("extractor") == section and "trained" in [feature.get(key, "trained") for key in reads]


def label(budget: Any) -> str:
    """`5%`, `200 rows` or `20000 tokens`."""
    made = Budget.parse(budget)
    if made.fraction is not None:
        return f"{100 * made.fraction:g}%"
    return f"{made.rows} rows" if made.rows is not None else f"{made.tokens} tokens"


def slug(budget: str) -> str:
    """A budget's label as part of a file's name."""
    return budget.replace("%", "pct").replace(" ", "-").replace(".", "_")


def load_grid(path: str | Path, overrides: Sequence[str] = ()) -> Plan:
    """Read a grid, apply `key=value` overrides, check everything that can be checked without data or model.

    Paths that begin with `./` or `../` are relative to the file.

    Errors: `UsageError`, one line: the key, what is allowed, what to type.
    """
    file = Path(path)
    if not file.is_file():
        raise UsageError(f"no grid at {file}; give a YAML file, e.g. eval/benchmark/grid-small.yaml")
    plain = _absolute(config.load_yaml(file), file.parent)
    plain = config.apply_overrides(plain, list(overrides))
    plan = Plan(config.from_dict(Grid, config.substitute(plain, plain.get("vars") or {})), file.parent.resolve())
    for model in plan.grid.models:
        plan.recipe(model).check()
    return plan


def _absolute(value: Any, folder: Path) -> Any:
    """Every text that is a relative path, `./x` or `../x`, against the folder of the file."""
    if is_mapping(value):
        return {key: _absolute(one, folder) for key, one in value.items()}
    if is_list(value):
        return [_absolute(one, folder) for one in value]
    return str((folder / value).resolve()) if isinstance(value, str) and value.startswith(("./", "../")) else value


def parse_only(given: Sequence[str], plan: Plan) -> dict[str, set[str]]:
    """`["method=trim,rds", "budget=5%"]` → the values that a cell may have, by key.

    Errors: `UsageError` for an unknown key and for a value that no cell has.
    """
    known = {key: {str(getattr(cell, key)) for cell in plan.cells()} for key in Cell.__dataclass_fields__}
    found: dict[str, set[str]] = {}
    for text in given:
        key, equals, values = text.partition("=")
        if not equals or key not in known:
            raise UsageError(f"--only {text}: give KEY=VALUE[,VALUE], KEY one of {', '.join(known)}")
        for value in (one.strip() for one in values.split(",")):
            if value not in known[key] and key == "budget" and value.isdigit():
                value = label(value)
            if value not in known[key]:
                allowed = ", ".join(sorted(known[key]))
                raise UsageError(f"--only {key}={value}: no cell has it.{nearest(value, known[key])} There are: {allowed}")
            found.setdefault(key, set()).add(value)
    return found
