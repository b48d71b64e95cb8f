"""Recipe: the whole experiment as one tree of frozen dataclasses; YAML, `key=value` and Python build the same one."""

from __future__ import annotations

import reprlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmselect import config
from llmselect.clustering import Clustering
from llmselect.color import ColorTraining, check_adapters, with_adapters
from llmselect.errors import UsageError, nearest
from llmselect.memory import check_memory
from llmselect.mixing import Limits
from llmselect.plain import is_list, is_mapping
from llmselect.refine_steps import Refine
from llmselect.refine_steps import check as check_refine
from llmselect.registry import extractors, selectors
from llmselect.sae.training import SaeTraining
from llmselect.selection import Budget
from llmselect.selectors._base import Selector, inputs_of
from llmselect.semdedup import Dedup
from llmselect.sources import Model, PoolSource, TargetSource
from llmselect.store import check_folder_name, check_name
from llmselect.tasks import check_tasks
from llmselect.train import Train

if TYPE_CHECKING:
    from llmselect.engine.extractor import Extractor

_INPUT_KEYS = ("x", "quality")  # inputs that a recipe names; the others follow from pool and targets
_PATHS = {"model": ("path",), "pool": ("path", "memory"), "refine": ("judge",)}
_FEATURE_PATHS = ("model", "adapter", "checkpoints", "sae", "prior", "conditional", "files")
_METHOD_KEYS = ("budget", "limits", "groups", "tasks")  # of any method


@dataclass(frozen=True)
class Warmup:
    """Fine-tune on a random part of the pool first; features with `adapter: warmup` see that model."""

    budget: Any = "5%"
    train: Train = field(default_factory=Train)
    seed: int = 0


@dataclass(frozen=True)
class Recipe:
    """Pool, targets, model, features, methods, budget, seeds, training."""

    name: str
    model: Model
    pool: PoolSource
    targets: dict[str, TargetSource]
    methods: dict[str, dict[str, Any]]
    features: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    budget: Any = field(default="5%", metadata={"help": 'rows, "5%", {fraction: 0.05} or {tokens: 200000}'})
    seeds: list[int] = field(default_factory=lambda: [0])
    train: Train = field(default_factory=Train)
    full: bool = field(default=True, metadata={"help": "also train on the whole pool, at the same token budget"})
    dedup: Dedup | None = field(default=None, metadata={"help": "semantic duplicates are never selected"})
    warmup: Warmup | None = None
    color: ColorTraining | None = field(default=None, metadata={"help": "train adapters per task for features of kind color"})
    sae: SaeTraining | None = field(default=None, metadata={"help": "train an SAE on the pool for features with sae: trained"})
    refine: Refine | None = field(default=None, metadata={"help": "also select in rounds of training and scoring"})
    batch_tokens: int | None = field(default=None, metadata={"help": "padded tokens per batch of a pass"})
    shard_rows: int = field(default=1024, metadata={"help": "rows per shard: the most a kill loses"})
    out: str | None = field(default=None, metadata={"help": "run folder; null: runs/<name>"})
    vars: dict[str, Any] = field(default_factory=dict[str, Any], metadata={"help": "values for ${name} in this file"})

    @property
    def folder(self) -> Path:
        return Path(self.out or f"runs/{self.name}")

    def extractor(self, name: str, warmup: str | None = None) -> Extractor:
        """The extractor of feature `name`, its model settings filled in from `model`."""
        where = f"features.{name}"
        options = dict(self.features[name])
        cls = _named(extractors, options.pop("extractor", None), where, "extractor")
        if not isinstance(options.pop("lazy", False), bool):
            raise UsageError(f"{where}.lazy: true or false")
        shared = {"model": self.model.path, "dtype": self.model.dtype, "max_length": self.model.max_length}
        made: Any = config.from_dict(cls, {**shared, **options}, where)
        if self.trains_sae(made):
            made = replace(made, sae=str(self.folder / "sae"))
        made = with_adapters(made, self)
        if getattr(made, "checkpoints", None) == "warmup" and warmup:
            made = replace(made, checkpoints=warmup)
        return replace(made, adapter=warmup) if made.adapter == "warmup" else made

    def lazy(self, name: str) -> bool:
        """Whether feature `name` (or an array of it) is computed for the rows that a selector asks for only."""
        return bool(self.features[name.partition(".")[0]].get("lazy", False))

    def trains_sae(self, extractor: Extractor) -> bool:
        """Whether a feature reads the SAE of this recipe's `sae:` section."""
        return self.sae is not None and getattr(extractor, "sae", None) == "trained"

    def selector(self, name: str) -> tuple[Selector, dict[str, Any]]:
        """The selector of method `name`, and the features that it reads by input name (`features_in`)."""
        where = f"methods.{name}"
        options = dict(self.methods[name])
        cls = _named(selectors, options.pop("selector", None), where, "selector")
        reads = {key: options.pop(key) for key in _INPUT_KEYS if key in options}
        options = {key: value for key, value in options.items() if key not in _METHOD_KEYS}
        known = [f.name for f in fields(cls)] + list(_INPUT_KEYS + _METHOD_KEYS)
        for key in options:
            if key not in known:
                raise UsageError(f"{where}.{key}: unknown key.{nearest(key, known)} Allowed: {', '.join(sorted(known))}")
        return config.from_dict(cls, options, where), reads

    def budget_of(self, name: str) -> Any:
        """The budget of method `name`: its own, or that of the recipe."""
        return self.methods[name].get("budget", self.budget)

    def limits_of(self, name: str) -> Limits | None:
        """The limits of method `name` on sources and targets, if it has some."""
        given = self.methods[name].get("limits")
        return None if given is None else config.from_dict(Limits, given, f"methods.{name}.limits")

    def tasks_of(self, name: str) -> list[str] | None:
        """The targets that method `name` selects for; None: all."""
        return self.methods[name].get("tasks")

    def grouping_of(self, name: str) -> Clustering | None:
        """The clusters that method `name` takes as groups; None: the sources of the rows."""
        return Clustering.parse(self.methods[name].get("groups"), f"methods.{name}.groups")

    def check(self) -> None:
        """Everything that can be wrong without reading data or loading a model.

        Errors: `UsageError`, one line: the key, what is allowed, what to type.
        """
        from llmselect.train import validate

        if not (self.methods or self.refine) or not self.targets:
            raise UsageError(f"{'targets' if self.methods or self.refine else 'methods'}: at least one is needed")
        self._check_names()
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise UsageError(f"seeds: {self.seeds} must be one or more distinct numbers")
        if self.shard_rows < 1 or (self.batch_tokens is not None and self.batch_tokens < 1):
            raise UsageError("shard_rows and batch_tokens must be at least 1")
        _prefixed("budget", lambda: Budget.parse(self.budget))
        try:
            self._check_files()
        except OSError as error:  # a path longer than paths can be
            raise UsageError(f"{reprlib.repr(error.filename)}: {error.strerror}") from None
        for name in self.features:
            made = self.extractor(name)
            for key in ("adapter", "checkpoints"):
                if getattr(made, key, None) == "warmup" and self.warmup is None:
                    raise UsageError(f"features.{name}.{key}: 'warmup' needs a warmup: section")
            if getattr(made, "checkpoints", None) == "warmup" and self.warmup and not self.warmup.train.checkpoints:
                raise UsageError("warmup.train.checkpoints: features with checkpoints: warmup need at least 1")
            check_adapters(made, self, name)
            if getattr(made, "sae", None) == "trained":
                raise UsageError(f"features.{name}.sae: 'trained' needs a sae: section; or give a folder or a release")
        for name in self.methods:
            self._check_method(name)
        if self.dedup:
            self.dedup.check(self.features)
        if self.refine:
            check_refine(self.refine, self)
        validate(self.train)
        if self.color:
            validate(self.color.train, "color.train")
        if self.warmup:
            _prefixed("warmup.budget", lambda: Budget.parse(self.warmup.budget if self.warmup else None))
            validate(self.warmup.train, "warmup.train")

    def _check_names(self) -> None:
        """Names are folders' as well."""
        rounds = {self.refine.method: None} if self.refine else {}
        for kind, names in (("methods", self.methods), ("targets", self.targets), ("features", self.features),
                            ("refine.method", rounds)):  # fmt: skip
            for name in names:
                check_folder_name(f"{kind}.{reprlib.repr(name)[1:-1]}", name)
        if not self.out and (Path(self.name).name != self.name or self.name in (".", "..")):
            raise UsageError(f"name: {reprlib.repr(self.name)} is also a folder's, below runs/; give one without '/', or out=")
        _prefixed("features", lambda: [check_name(name) for name in self.features])

    def _check_files(self) -> None:
        from llmselect.readers import check_source

        check_source(self.pool.path, "pool.path")
        if self.pool.memory is not None:
            check_memory(self.pool.memory)
        for name, source in self.targets.items():
            for key in ("dev", "test"):
                if (path := getattr(source, key)) is not None:
                    check_source(path, f"targets.{name}.{key}")
        if looks_like_path(self.model.path) and not (Path(self.model.path) / "config.json").exists():
            raise UsageError(f"model.path: {self.model.path} is not a folder with a config.json; give a model folder or Hub id")

    def _check_method(self, name: str) -> None:
        selector, reads = self.selector(name)
        _prefixed(f"methods.{name}.budget", lambda: Budget.parse(self.budget_of(name)))
        if (limits := self.limits_of(name)) and (unknown := set(limits.quotas) - set(self.targets)):
            raise UsageError(f"methods.{name}.limits.quotas.{min(unknown)}: no such target; there are {list(self.targets)}")
        inputs = inputs_of(type(selector))
        grouping = self.grouping_of(name)
        if grouping and grouping.x.partition(".")[0] in self.features and self.lazy(grouping.x):
            raise UsageError(f"methods.{name}.groups: clusters need all of {grouping.x}; give the feature lazy: false")
        if grouping and self.limits_of(name):
            raise UsageError(f"methods.{name}.limits: they are on sources, and groups: takes clusters in their place; give one")
        for key in [*reads, *({"groups"} & set(self.methods[name]))]:
            if key not in inputs:
                raise UsageError(f"methods.{name}.{key}: '{selector.name}' takes no {key}; its inputs: {list(inputs)}")
        for key, required in inputs.items():
            if key in _INPUT_KEYS and required and key not in reads:
                raise UsageError(f"methods.{name}: '{selector.name}' needs {key}, the name of a feature: {list(self.features)}")
        for key, feature in {**reads, **({"groups": grouping.x} if grouping else {})}.items():
            several = features_in(feature)
            for one in several:
                if one.partition(".")[0] not in self.features:
                    raise UsageError(f"methods.{name}.{key}: no feature {reprlib.repr(one)}.{nearest(one, self.features)} "
                                     f"There are: {list(self.features)}")  # fmt: skip
                if self.lazy(one) and (key not in selector.lazy or len(several) > 1):
                    raise UsageError(f"methods.{name}.{key}: '{selector.name}' reads all of {key}; "
                                     f"give features.{one} lazy: false")  # fmt: skip
        check_tasks(self, name)


def features_in(read: Any) -> list[str]:
    """The features that an input of a method names: one, or a list whose columns stand side by side.

    Errors: `UsageError` for an empty list.
    """
    if is_list(read) and not read:
        raise UsageError("a list of features is empty; name at least one")
    return [str(one) for one in read] if is_list(read) else [str(read)]


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe file (or a folder holding `recipe.yaml`), apply `key=value` overrides, check everything.

    Paths in the file are relative to the file; in overrides to the current folder.

    Errors: `UsageError` before any data is read or any model loads.
    """
    file = Path(path) / "recipe.yaml" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        known = [*map(str, Path().glob("*.y*ml")), *(str(one.parent) for one in Path("recipes").glob("*/recipe.yaml"))]
        raise UsageError(f"no recipe at {file}; give a YAML file or a folder that holds recipe.yaml.{nearest(str(path), known)}")
    plain = config.load_yaml(file)
    plain = _absolute(plain, file.parent)
    plain = config.apply_overrides(plain, list(overrides or []))
    plain = config.substitute(plain, plain.get("vars") or {})
    recipe = config.from_dict(Recipe, plain)
    recipe.check()
    return recipe


def looks_like_path(text: str) -> bool:
    """Whether `text` means a place on disk rather than a Hub id: it exists, starts with . / ~, or has many parts."""
    return Path(text).exists() or text.startswith((".", "/", "~")) or text.count("/") > 1


def _absolute(plain: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Resolve what looks like a relative path (`./x`, `../x`) in the known places against the recipe's folder."""

    def resolve(value: Any) -> Any:
        if is_list(value):
            return [resolve(one) for one in value]
        if is_mapping(value):  # a folder for each task
            return {k: resolve(one) for k, one in value.items()}
        return str((folder / value).resolve()) if isinstance(value, str) and value.startswith(("./", "../")) else value

    def within(part: Any, keys: Collection[str]) -> Any:
        return {k: resolve(v) if k in keys else v for k, v in part.items()} if is_mapping(part) else part

    out = {k: within(v, _PATHS[k]) if k in _PATHS else v for k, v in plain.items()}
    for section, keys in (("targets", ("dev", "test")), ("features", _FEATURE_PATHS)):
        if isinstance(out.get(section), Mapping):
            out[section] = {name: within(one, keys) for name, one in out[section].items()}
    return out


def _named(registry: Any, name: Any, where: str, key: str) -> type[Any]:
    if name is None:
        raise UsageError(f"{where}.{key}: missing; one of {', '.join(registry.names())}")
    if not isinstance(name, str) or len(name) > 100:
        raise UsageError(f"{where}.{key}: expected a name, got {reprlib.repr(name)}; one of {', '.join(registry.names())}")
    try:
        return registry.get(name)
    except UsageError as error:
        raise UsageError(f"{where}.{key}: {error}") from None


def _prefixed(where: str, check: Any) -> None:
    try:
        check()
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None
