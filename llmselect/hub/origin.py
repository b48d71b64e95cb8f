"""Where the rows come from, told without a folder of this machine: source, licences, language, recipe."""

from __future__ import annotations

# datasets has no types.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmselect import adapter_card, config
from llmselect.errors import UsageError
from llmselect.plain import is_list, is_mapping, is_sequence
from llmselect.recipe import Recipe, looks_like_path

if TYPE_CHECKING:
    from datasets import Dataset

NOT_STATED = "not stated"
# The identifiers that the Hub takes in `license:`; any other licence is `other` with its name.
IDENTIFIERS = frozenset(
    """apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
    afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
    cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl
    lgpl-2.1 lgpl-3.0 isc lppl-1.3c ms-pl mpl-2.0 odc-by odbl openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl
    gemma llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 unknown other""".split()
)
_INSIDE = re.compile(r"(?<![\w.:/])(?:/[\w.+@~-]+){2,}/?")  # a folder inside a longer text; not a part of a URL


def clean(value: Any) -> Any:
    """`value` with every folder of this machine in its texts cut to the last part."""
    if is_mapping(value):
        return {name: clean(one) for name, one in value.items()}
    if is_sequence(value):
        return [clean(one) for one in value]
    if not isinstance(value, str):
        return value
    return _INSIDE.sub(lambda found: Path(found[0]).name, adapter_card.public(value))


@dataclass(frozen=True)
class Licence:
    """What the selected rows say about their licence: the Hub's `id` (and `name` where that is `other`), rows by licence."""

    id: str | None = None
    name: str | None = None
    rows: Mapping[str, int] = field(default_factory=dict[str, int])


@dataclass(frozen=True)
class Origin:
    """Pool, model and recipe as they may be published.

    `dataset` is the Hub id of the pool, if it has one; `revision`, `licence` and `language` are those its card states;
    `missing` are the settings whose value was a place on this machine.
    """

    pool: str
    dataset: str | None = None
    revision: str | None = None
    licence: str | None = None
    language: str | None = None
    model: str | None = None
    recipe: Mapping[str, Any] | None = None
    missing: tuple[str, ...] = ()


def of_dataset(name: str | None) -> Origin:
    """The origin of rows from the Hub dataset `name`, as its card in the local cache tells; nothing is contacted."""
    if name is None:
        return Origin("a pool that has no public name")
    check_id(name, "source")
    import yaml
    from huggingface_hub import DatasetCard, try_to_load_from_cache

    found = try_to_load_from_cache(name, "README.md", repo_type="dataset")
    if not isinstance(found, str):
        return Origin(name, name)
    head: dict[str, Any]
    try:
        head = DatasetCard.load(Path(found), ignore_metadata_errors=True).data.to_dict()
    except (ValueError, yaml.YAMLError):
        head = {}  # a card that cannot be read states nothing
    licence = head.get("license")
    if licence == "other":
        licence = head.get("license_name") or licence
    language = head.get("language")
    language = language[0] if is_list(language) and len(language) == 1 else language
    # Of several languages nobody knows which ones the selected rows are in.
    language = language if isinstance(language, str) else None
    stated = label(licence)
    return Origin(name, name, Path(found).parent.name, None if stated == NOT_STATED else stated, language)


def noted(name: str) -> dict[str, str | None] | None:
    """What `rows.json` keeps of a Hub dataset at the time when it is read; None for files."""
    if looks_like_path(name):
        return None
    found = of_dataset(name)
    return {"id": name, "revision": found.revision, "licence": found.licence, "language": found.language}


def of_recipe(recipe: Recipe, base_model: str | None, note: Mapping[str, Any] | None = None) -> Origin:
    """The origin of a run's rows; `base_model` is the public name of its model, `note` what `noted` kept."""
    given = base_model is not None and check_id(base_model, "--base-model") != recipe.model.path
    if given and not looks_like_path(recipe.model.path):
        raise UsageError(f"--base-model {base_model}: the run's model is {recipe.model.path}; leave the option out")
    plain = config.to_dict(recipe)
    told = {name: clean(value) for name, value in plain.items() if name not in ("out", "vars")}
    if base_model is not None:
        told["model"]["path"] = base_model
    model = told["model"]["path"]
    if note is not None:
        found = Origin(note["id"], note["id"], note["revision"], note["licence"], note["language"])
    elif looks_like_path(recipe.pool.path) or recipe.pool.path != told["pool"]["path"]:
        found = Origin(told["pool"]["path"])
    else:
        found = of_dataset(recipe.pool.path)
    places = {"pool.path": recipe.pool.path, "pool.memory": recipe.pool.memory}
    places |= {"model.path": "" if base_model else recipe.model.path}
    places |= {f"targets.{n}.{k}": getattr(t, k) for n, t in recipe.targets.items() for k in ("dev", "test")}
    missing = tuple(key for key, value in places.items() if value and looks_like_path(value))
    return Origin(found.pool, found.dataset, found.revision, found.licence, found.language, model, told, missing)


def check_id(name: str, where: str) -> str:
    """`name`, if it can be a Hub id. Errors: `UsageError` for a folder, and for what the Hub takes as no name."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UsageError(f"{where}: {name!r} is no Hub id ({error}); type e.g. {where} my-name/my-repo") from None
    if where != "repo" and looks_like_path(name):
        raise UsageError(f"{where}: {name!r} is a folder here, give the id on the Hub, e.g. HuggingFaceTB/SmolLM2-135M")
    return name


def licence_of(pool: Dataset, rows: np.ndarray, stated: str | None) -> Licence:
    """The licence of `rows`: what each says, else `stated`, what the dataset they come from says; never invented."""
    if "license" in pool.column_names:
        told: list[Any] = [*pool.select_columns(["license"]).select(rows)["license"]]
        found = Counter(label(one or stated) for one in told)
    else:
        found = Counter({label(stated): len(rows)})
    counts = dict(sorted(found.items(), key=lambda one: (-one[1], one[0])))
    if len(counts) > 1:
        return Licence("other", "mixed", counts)
    only = next(iter(counts), NOT_STATED)
    if only == NOT_STATED:
        return Licence(None, None, counts)
    if only in IDENTIFIERS:
        return Licence(only, None, counts)
    return Licence("other", re.sub(r"[^a-z0-9.]+", "-", only.lower()).strip("-.")[:60] or "unnamed", counts)


def label(stated: Any) -> str:
    """A licence by the Hub's identifier where it is only written otherwise (`CC BY 4.0`), else as stated."""
    stated = ", ".join(map(str, stated)) if is_list(stated) else str(stated or "")
    if not stated.strip():
        return NOT_STATED
    plain = re.sub(r"[\s_]+", "-", stated.strip().lower())
    return plain if plain in IDENTIFIERS else " ".join(stated.split())[:200]
