"""Selections, features and adapters to the Hugging Face Hub. Pushing twice pushes once; a failed push can be repeated."""

from __future__ import annotations

# datasets has no types.
# pyright: reportMissingTypeStubs=false
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from llmselect.errors import UsageError, nearest
from llmselect.selection import Selection

if TYPE_CHECKING:
    from datasets import Dataset

    from llmselect.hub.content import Source
    from llmselect.hub.remote import Pushed
    from llmselect.stages import Run


@dataclass(frozen=True)
class Report:
    """One repository: its card, its files with their sizes in bytes, and what was done; None after a dry run."""

    repo: str
    kind: str
    card: str
    files: dict[str, int] = field(default_factory=dict[str, int])
    pushed: Pushed | None = None

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def text(self) -> str:
        """For a person: after a dry run the card and the files, otherwise the address."""
        if self.pushed is not None:
            return f"{'pushed' if self.pushed.changed else 'already there'}: {self.pushed.url}"
        lines = [f"{size:>12,}  {name}" for name, size in sorted(self.files.items())]
        return "\n".join([self.card, f"{self.kind} {self.repo}: {len(lines)} files, {sum(self.files.values()):,} bytes", *lines])


def push_selection(selection: Selection, repo: str, pool: Dataset, *, source: str | None = None, private: bool = False,
                   create_pr: bool = False, dry_run: bool = False) -> Report:  # fmt: skip
    """Push one selection as a dataset: its rows in rank order, scores, card and manifest.

    Args:
        repo: id of the dataset on the Hub; without an owner it is the user's.
        pool: the rows selected from, as `load_pool` gives them; a column `license` tells the licence of each.
        source: Hub id of the dataset that the pool is; licence and language of its card hold where rows state none.
        private: make the repository private; refused if it is there and public.
        create_pr: open a pull request instead of writing to `main`.
        dry_run: return card and files; nothing is contacted.

    Errors: `UsageError` for wrong names and without a token; `LlmselectError` when the Hub refuses.
    """
    from llmselect.engine.extraction import content_digest
    from llmselect.hub import content, origin, rows

    origin.check_id(repo, "repo")
    if missing := {"id", "messages"} - set(pool.column_names):
        raise UsageError(f"the pool has no column {min(missing)!r}; give the dataset that llmselect.load_pool returned")
    about = content.Source([rows.subset(selection)], pool, content_digest(pool), origin.of_dataset(source))
    return _push(repo, about, private, create_pr, dry_run)[0]


def push_run(folder: Path | str, repo: str, *, methods: Sequence[str] | None = None, private: bool = False,
             create_pr: bool = False, dry_run: bool = False, features: bool = False, adapters: bool = False,
             base_model: str | None = None) -> list[Report]:  # fmt: skip
    """Push the selections of a run as one dataset, a configuration per method and seed; seeds that select the same rows in the
    same order are one, named by the first of them.

    Args:
        folder: of the run.
        repo, private, create_pr, dry_run: as for `push_selection`.
        methods: only these.
        features: also the feature store, as files below `features/`.
        adapters: also the adapters, as a model repository of the same id with a folder per method and seed.
        base_model: Hub id of the run's model where that is a folder.

    Errors: `UsageError` for what the run does not have and for wrong names; `LlmselectError` when the Hub refuses.
    """
    from llmselect.hub import adapters as models
    from llmselect.hub import origin

    origin.check_id(repo, "repo")
    run = _opened(Path(folder))
    about = _source(run, methods, base_model)
    base = models.base_of(run.recipe.model.path, base_model) if adapters else None
    return _push(repo, about, private, create_pr, dry_run, run if features else None,
                 None if base is None else (run.folder, methods, base))  # fmt: skip


def _push(repo: str, about: Source, private: bool, create_pr: bool, dry_run: bool, features: Run | None = None,
          adapters: tuple[Path, Sequence[str] | None, str] | None = None) -> list[Report]:  # fmt: skip
    from llmselect.hub import adapters as models
    from llmselect.hub import content, remote

    with TemporaryDirectory(prefix="llmselect-push-") as temporary:
        scratch = Path(temporary)
        uploaded = {} if features is None else content.feature_files(features.store, scratch)
        api, user, repo = (None, "", repo) if dry_run else remote.connect(repo)
        plans = {"dataset": content.files(about, repo, scratch, uploaded)}
        if adapters is not None:
            sources = [about.origin.dataset] if about.origin.dataset else []
            run, methods, base = adapters
            plans["model"] = models.files(run, methods, base, repo, repo, sources, scratch)
        reports = list[Report]()
        for kind, files in plans.items():
            sizes = {name: file.stat().st_size for name, file in files.items()}
            report = Report(repo, kind, files["README.md"].read_text("utf-8"), sizes)
            if not dry_run:
                target = remote.Target(repo, kind, private, create_pr)
                report = replace(report, pushed=remote.send(api, user, target, files))
            reports.append(report)
        return reports


def _opened(folder: Path) -> Run:
    """The run in `folder`, wherever that was when it was made; its pool and model need not be there any more."""
    from llmselect import config
    from llmselect.recipe import Recipe
    from llmselect.stages import Run

    if not (folder / "config.yaml").is_file():
        raise UsageError(f"{folder}: no run there (no config.yaml); give the folder of one, e.g. runs/NAME")
    recipe = config.from_dict(Recipe, config.load_yaml(folder / "config.yaml"))
    return Run(replace(recipe, out=str(folder)))


def _source(run: Run, methods: Sequence[str] | None, base_model: str | None) -> Source:
    """The selections of a run and what was read for them."""
    from llmselect.hub import content, origin, rows
    from llmselect.recipe import features_in
    from llmselect.stages import TOKENS

    known = list(run.recipe.methods)
    for name in methods or ():
        if name not in known:
            raise UsageError(f"--method {name}: not in this run.{nearest(name, known)} There are: {', '.join(known)}")
    subsets: list[rows.Subset] = []
    for method in known if methods is None else dict.fromkeys(methods):
        orders: set[bytes] = set()
        for seed in run.recipe.seeds:
            place = run.folder / "selections" / method / f"seed-{seed}"
            if not (place / "selection.json").exists():
                raise UsageError(f"{method}, seed {seed} is not selected yet; type: llmselect select "
                                 f"{run.folder / 'config.yaml'}")  # fmt: skip
            selection = Selection.load(place)
            if (order := selection.indices.tobytes()) not in orders:  # most methods leave nothing to chance
                subsets.append(rows.subset(selection, json.loads((place / "selection.json").read_bytes())["checksum"]))
            orders.add(order)
    reads = [read for one in subsets for read in one.about.get("reads", {}).values()]
    names = {feature.partition(".")[0] for read in reads for feature in features_in(read)}
    versions, account = (json.loads((run.folder / f"{name}.json").read_text("utf-8")) for name in ("versions", "rows"))
    source = origin.of_recipe(run.recipe, base_model, account.get("dataset"))
    return content.Source(subsets, run.pool, run.store.open(TOKENS).spec["rows"], source, versions,
                          {name: _feature(run, name) for name in sorted(names)})  # fmt: skip


def _feature(run: Run, name: str) -> dict[str, Any]:
    from llmselect import config
    from llmselect.hub.origin import clean
    from llmselect.store import FeatureStore

    store = FeatureStore(run.store.path / "lazy") if run.recipe.lazy(name) else run.store
    spec = dict(store.open(name).spec)
    return {"extractor": spec["extractor"], "version": spec["version"], "settings": clean(spec["settings"]),
            "weights": spec.get("weights"), "tokenizer": spec.get("tokens"), "fingerprint": config.fingerprint(spec)}  # fmt: skip
