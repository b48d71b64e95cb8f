"""What a dataset repository of selections holds: parquet, scores, card, picture, recipe, and a manifest that pins all."""

from __future__ import annotations

# datasets has no types.
# pyright: reportMissingTypeStubs=false
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import llmselect
from llmselect import atomic, config
from llmselect.errors import LlmselectError
from llmselect.hub import card, citations, picture, rows
from llmselect.hub.origin import Licence, Origin, clean, licence_of
from llmselect.registry import extractors, selectors
from llmselect.store import FeatureStore
from llmselect.strict_yaml import dump_yaml

if TYPE_CHECKING:
    from datasets import Dataset

PICTURE, RECIPE, SCORES = "source-mix.png", "recipe.yaml", "scores.parquet"


@dataclass(frozen=True)
class Source:
    """What is pushed: the selections, their pool, where it all comes from, and the features that were read."""

    subsets: Sequence[rows.Subset]
    pool: Dataset
    pool_digest: str
    origin: Origin
    versions: Mapping[str, str] = field(default_factory=dict[str, str])
    features: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])


def files(source: Source, repo: str, scratch: Path, uploaded: Mapping[str, Path]) -> dict[str, Path]:
    """Write everything below `scratch`; returns path in the repository → file, `uploaded` ones included."""
    found: dict[str, Path] = {}
    for one in source.subsets:
        name = f"data/{one.name}.parquet"
        found[name] = _place(scratch, name)
        rows.write_rows(one, source.pool, found[name])
    if rows.write_scores(source.subsets, source.pool, _place(scratch, SCORES)):
        found[SCORES] = scratch / SCORES
    mix = rows.mix(source.subsets, source.pool)
    if mix is not None and picture.source_mix(mix.sources, mix.shares, _place(scratch, PICTURE)):
        found[PICTURE] = scratch / PICTURE
    if source.origin.recipe is not None:
        found[RECIPE] = _place(scratch, RECIPE)
        atomic.write_text(found[RECIPE], dump_yaml(dict(source.origin.recipe)))
    picked = np.unique(np.concatenate([one.selection.indices for one in source.subsets]))
    licence = licence_of(source.pool, picked, source.origin.licence)
    manifest, readme = _place(scratch, "llmselect.json"), _place(scratch, "README.md")
    atomic.write_json(manifest, _manifest(source, licence, {**found, **uploaded}))
    atomic.write_text(readme, _card(source, repo, licence, mix, set(found)))
    return {**found, **uploaded, "llmselect.json": manifest, "README.md": readme}


def _place(scratch: Path, name: str) -> Path:
    file = scratch / name
    file.parent.mkdir(parents=True, exist_ok=True)
    return file


def _manifest(source: Source, licence: Licence, found: Mapping[str, Path]) -> dict[str, Any]:
    """Every revision: of pool, model, libraries, selections and files. Without times, so that equal pushes are equal."""
    origin = source.origin
    weights = sorted({one["weights"] for one in source.features.values() if one["weights"]})
    return {
        "format": 1,
        "versions": {**source.versions, "llmselect": llmselect.__version__},
        "pool": {"name": origin.pool, "dataset": origin.dataset, "revision": origin.revision, "rows": len(source.pool),
                 "digest": source.pool_digest},
        "model": None if origin.model is None else {"name": origin.model, "weights": weights},
        "recipe": None if origin.recipe is None else config.fingerprint(dict(origin.recipe)),
        "features": {name: dict(one) for name, one in source.features.items()},
        "selections": {one.name: {**one.about, "method": one.method, "rows": len(one.selection), "checksum": one.checksum,
                                  "file": f"data/{one.name}.parquet"} for one in source.subsets},
        "licence": {"id": licence.id, "name": licence.name, "rows": dict(licence.rows)},
        "sha256": {name: atomic.sha256_file(file) for name, file in sorted(found.items())},
    }  # fmt: skip


def _card(source: Source, repo: str, licence: Licence, mix: rows.Mix | None, found: set[str]) -> str:
    origin = source.origin
    methods = [(selectors, str(one.about.get("selector"))) for one in source.subsets]
    methods += [(extractors, one["extractor"]) for one in source.features.values()]
    return card.render(
        card.DATASET, _head(source, licence, found), name=repo.split("/")[-1], repo=repo, version=llmselect.__version__,
        subsets=source.subsets, scores=SCORES in found, origin=origin, pool_rows=len(source.pool),
        features=source.features, mix=mix, picture=PICTURE in found, licence=licence, reproduce=_reproduce(source),
        bibtex=citations.bibtex(dict.fromkeys(methods)),
    )  # fmt: skip


def _head(source: Source, licence: Licence, found: set[str]) -> dict[str, Any]:
    """The YAML of the card; what is not known is left out."""
    origin = source.origin
    made = [str(one.about.get("selector")) for one in source.subsets]
    head = {
        "license": licence.id,
        "license_name": licence.name,
        "language": [origin.language] if origin.language else None,
        "source_datasets": [origin.dataset] if origin.dataset else None,
        "size_categories": [card.size_category(max(len(one.selection) for one in source.subsets))],
        "tags": list(dict.fromkeys(["llmselect", "data-selection", "instruction-tuning", *made])),
    }
    configs: list[dict[str, Any]] = [_config(one.name, f"data/{one.name}.parquet") for one in source.subsets]
    configs[0]["default"] = True
    if SCORES in found:
        configs.append(_config("scores", SCORES))
    return {name: value for name, value in {**head, "configs": configs}.items() if value is not None}


def _config(name: str, path: str) -> dict[str, Any]:
    return {"config_name": name, "data_files": [{"split": "train", "path": path}]}


def _reproduce(source: Source) -> Any:
    """The command and the recipe; without a recipe the settings of each method."""
    from markupsafe import Markup

    origin = source.origin
    if origin.recipe is None:
        plain = {one.name: {name: one.about.get(name) for name in ("selector", "config", "budget", "seed")}
                 for one in source.subsets}  # fmt: skip
        return card.fenced(dump_yaml(plain), "yaml")
    missing = "".join(f" {name}=PATH" for name in origin.missing)
    said = f"With llmselect {llmselect.__version__} and the recipe of this repository, which is the one below"
    said += "; what has no public place is given by path:" if missing else ":"
    command = card.fenced(f"llmselect select recipe.yaml{missing}", "bash")
    return Markup("\n").join([card.cell(said), Markup(), command, card.fenced(dump_yaml(dict(origin.recipe)), "yaml")])


def feature_files(store: FeatureStore, scratch: Path) -> dict[str, Path]:
    """The files of a feature store for `features/`: shards as they are, specs without folders of this machine.

    Features computed on demand hold the rows that were asked for; any other has to be complete.

    Errors: `LlmselectError` naming a feature that is not complete.
    """
    found: dict[str, Path] = {}
    lazy = FeatureStore(store.path / "lazy")
    for place, home in (("features", store), ("features/lazy", lazy)):
        for name in home.names():
            feature = home.open(name)
            if home is store and (missing := feature.missing()):
                raise LlmselectError(f"feature '{name}' lacks shards {missing[:5]}; extract first, or push without --features")
            for file in sorted(feature.folder.glob("[!.]*")):
                found[f"{place}/{name}/{file.name}"] = file
            spec = _place(scratch, f"{place}/{name}/spec.json")
            atomic.write_json(spec, clean(dict(feature.spec)))
            found[f"{place}/{name}/spec.json"] = spec
    return found
