"""Which rows a run uses: pool and targets read, evaluation text dropped, what does not fit or is not finite set aside."""

from __future__ import annotations

# datasets and pyarrow have no types.
# pyright: reportMissingTypeStubs=false, reportUnknownVariableType=false
import array
import io
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmselect import account, atomic, config
from llmselect.array_views import Subset
from llmselect.arrays import fold_ids
from llmselect.errors import LlmselectError, UsageError
from llmselect.hub.origin import noted
from llmselect.memory import of_memory, remembered
from llmselect.readers import contents
from llmselect.selection import Budget
from llmselect.sources import PoolSource, identity
from llmselect.strict_yaml import dump_yaml

if TYPE_CHECKING:
    from datasets import Dataset

    from llmselect.recipe import Recipe
    from llmselect.stages import Run

log = logging.getLogger("llmselect")
USABLE, VERSIONS = "pool/usable.npy", "versions.json"
FILES = "pool/files.json"  # times and digests of what was read, so that it need not be read to know that it is the same


def prepare(run: Run) -> None:
    """Read pool and targets, quarantine what is bad, drop evaluation text, and find the rows that fit."""
    run.main_first(lambda: _prepare(run))


def check_budgets(recipe: Recipe, rows: int) -> None:
    """Refuse a budget larger than the pool before any feature is computed. Errors: `UsageError` naming the key."""
    own = {f"methods.{name}.budget": recipe.budget_of(name) for name in recipe.methods}
    for key, budget in {"budget": recipe.budget, **own}.items():
        parsed = Budget.parse(budget)
        try:
            if parsed.rows is not None:
                parsed.rows_of(rows)
        except UsageError as error:
            raise UsageError(f"{key}: {error}") from None


def _prepare(run: Run) -> None:
    recipe, folder = run.recipe, run.folder
    given = [recipe.pool.path, recipe.pool.memory, *(p for t in recipe.targets.values() for p in (t.dev, t.test))]
    places = [place for place in given if place]
    done, seen = folder / account.NAME, folder / FILES
    known = atomic.read_sealed(seen, f"delete {seen} and run again") if seen.exists() else {}
    if (files := contents(places, known)) != known:
        seen.parent.mkdir(parents=True, exist_ok=True)
        atomic.write_sealed(seen, files)
    key = config.fingerprint({"pool": identity(recipe.pool), "model": config.to_dict(recipe.model),
                              "targets": {name: identity(one) for name, one in recipe.targets.items()},
                              "files": {name: digest for name, (*_, digest) in files.items()}})  # fmt: skip
    if done.exists() and account.read(folder)["key"] == key:
        account.intact(folder, VERSIONS)
        atomic.write_text(folder / "config.yaml", dump_yaml(config.to_dict(recipe)))  # methods may have joined
        return
    if done.exists() and run.store.names():
        raise LlmselectError(f"{folder} was made from other rows or another model (pool, targets or model changed); "
                             "give this run another out=, or delete that folder")  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    done.unlink(missing_ok=True)  # or a kill in between would leave it to vouch for the rows of another recipe
    atomic.write_text(folder / "config.yaml", dump_yaml(config.to_dict(recipe)))
    atomic.write_json(folder / VERSIONS, _versions())
    with run.timed("prepare"):
        found = _read_rows(run)
        found |= _usable(run)
        if (published := noted(recipe.pool.path)) is not None:
            found["dataset"] = published
        sides = [*(f"targets/{name}" for name in recipe.targets), *(f"tests/{n}" for n, t in recipe.targets.items() if t.test)]
        arrows = [f"{side}/pool.arrow" for side in ("pool", *sides)]
        account.write(folder, {"key": key, **found}, [*arrows, USABLE, VERSIONS])


def _read_rows(run: Run) -> dict[str, Any]:
    from llmselect.pool import PoolReport, read_pool

    recipe, reports = run.recipe, dict[str, PoolReport]()
    source: PoolSource = recipe.pool
    evaluation: list[Dataset] = []
    for name, task in recipe.targets.items():
        shared: dict[str, Any] = {"columns": task.columns, "group": name, "max_invalid": source.max_invalid,
                                  "subset": task.subset}  # fmt: skip
        dev, reports[f"targets.{name}"] = read_pool(
            task.dev, split=task.dev_split, limit=task.dev_limit, workdir=run.folder / f"targets/{name}", **shared
        )
        evaluation.append(dev)
        if task.test:
            test, reports[f"tests.{name}"] = read_pool(
                task.test, split=task.test_split, limit=task.test_limit, workdir=run.folder / f"tests/{name}", **shared
            )
            evaluation.append(test)
    _, reports["pool"] = read_pool(
        source.path, columns=source.columns, split=source.split, subset=source.subset, limit=source.limit,
        max_invalid=source.max_invalid, max_row_bytes=source.max_row_bytes, workdir=run.folder / "pool",
        against=evaluation if source.decontaminate else (), quarantine=run.folder / "quarantine.jsonl",
        memory=remembered(source.memory) if source.memory else (),
    )  # fmt: skip
    return {name: report.plain() for name, report in reports.items()}


def _usable(run: Run) -> dict[str, Any]:
    """Rows with response text that fits; the others join the quarantine. Nothing of the model is loaded."""
    from llmselect.engine.backbone import Backbone

    encoder = Backbone(run.recipe.model.path, max_length=run.recipe.model.max_length, tokens=run.store.tokens).encoder
    data, keep = run.opened("pool"), array.array("q")
    rejected = list[dict[str, str]]()
    for start in range(0, len(data), 1000):
        part: dict[str, list[Any]] = data[start : start + 1000]
        for i, row in enumerate(_encoded(encoder, part["messages"])):
            if isinstance(row, LlmselectError):
                reason, why = "template_refuses", str(row)[:300]
            elif row.response_cut and run.recipe.pool.overlong == "reject":
                reason, why = "longer_than_context", f"{row.response_cut} response tokens do not fit into {encoder.max_length}"
            elif not (row.content == 2).any():
                reason, why = "only_special_tokens", "no response text is left between the special tokens"
            else:
                keep.append(start + i)
                continue
            rejected.append(
                {"kind": "unusable", "reason": reason, "detail": why, "origin": f"pool row {start + i}", "id": part["id"][i]}
            )
    _replace_lines(run.folder / "quarantine.jsonl", "unusable", rejected)
    if not keep:
        first = f"; the first: {rejected[0]['detail']}" if rejected else ""
        raise LlmselectError(f"no row of the pool has a response that fits into {encoder.max_length} tokens{first}")
    buffer = io.BytesIO()
    np.save(buffer, np.frombuffer(keep, np.int64), allow_pickle=False)
    atomic.write_bytes(run.folder / USABLE, buffer.getvalue())
    reasons = {r: sum(one["reason"] == r for one in rejected) for r in {one["reason"] for one in rejected}}
    if rejected:
        log.info("%d rows set aside: %s", len(rejected), reasons)
    return {"usable": len(keep), "unusable": reasons}


def _encoded(encoder: Any, conversations: list[Any]) -> list[Any]:
    """Tokens of each conversation, or the error of one that the template refuses: a row of odd roles must not end a run."""
    try:
        return encoder.encode(conversations)
    except LlmselectError as error:
        if len(conversations) == 1:
            return [error]
        half = len(conversations) // 2
        return _encoded(encoder, conversations[:half]) + _encoded(encoder, conversations[half:])


def set_aside(run: Run, features: list[str]) -> None:
    """Rows with a feature that is not finite join the quarantine; methods that read the feature leave them out."""
    found = list[tuple[int, str, str]]()
    for name in features:
        feature = run.store.open(name)
        for key, rows in feature.non_finite.items():
            found += [(int(row), f"{name}.{key}", feature.ids[int(row)]) for row in rows]
    entries = [{"kind": "non_finite", "reason": "non_finite", "detail": f"{where} holds NaN or infinity",
                "origin": f"usable row {row}", "id": row_id} for row, where, row_id in sorted(found)]  # fmt: skip
    _replace_lines(run.folder / "quarantine.jsonl", "non_finite", entries)


def semantic_duplicates(run: Run) -> np.ndarray | None:
    """The semantic duplicates of the recipe's `dedup:` section, found once; all of them in `semantic_duplicates.parquet`."""
    recipe, file = run.recipe, run.folder / "semantic_duplicates.parquet"
    if recipe.dedup is None:
        return None
    import pyarrow
    import pyarrow.parquet

    from llmselect import semdedup

    pa: Any = pyarrow
    pq: Any = pyarrow.parquet
    x: Any = run.store[recipe.dedup.x]
    names = [name for name in (recipe.dedup.x, recipe.dedup.quality) if name]
    specs = {name: dict(run.store.open(name.partition(".")[0]).spec) for name in names}
    key = config.fingerprint({"dedup": config.to_dict(recipe.dedup), "features": specs})
    if file.exists() and (pq.read_schema(file).metadata or dict[bytes, bytes]()).get(b"key", b"").decode() == key:
        return pq.read_table(file)["index"].to_numpy()
    good = np.delete(np.arange(len(x)), x.non_finite)
    asked = recipe.dedup
    quality, old = None if asked.quality is None else run.store[asked.quality][good], of_memory(run)
    with run.timed("dedup"):
        found = semdedup.semantic_duplicates(Subset(x, good), asked.threshold, clusters=asked.clusters, quality=quality,
                                             ids=fold_ids(x.ids.raw)[good], first=None if old is None else old[good])  # fmt: skip
    dropped, nearest = good[found.dropped], good[found.nearest]
    table = pa.table({"index": dropped, "id": x.ids[dropped], "nearest": nearest, "nearest_id": x.ids[nearest],
                      "cosine": found.cosine})  # fmt: skip
    buffer = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({"key": key}), buffer)
    atomic.write_bytes(file, buffer.getvalue())
    log.info("%d of %d rows are semantic duplicates and will not be selected: %s", len(found), len(x), file)
    return dropped


def _replace_lines(quarantine: Path, kind: str, entries: list[dict[str, Any]]) -> None:
    """Put `entries` in the place of those of their kind, so that a stage may run twice."""
    start = json.dumps({"kind": kind})[:-1].encode()
    before = quarantine.read_bytes() if quarantine.exists() else b""
    kept = [line for line in before.split(b"\n") if line and not line.startswith(start)]
    lines = kept + [json.dumps(one, ensure_ascii=False).encode() for one in entries]
    atomic.write_bytes(quarantine, b"".join(line + b"\n" for line in lines))


def _versions() -> dict[str, str]:
    import platform
    from importlib import metadata

    names = ("torch", "transformers", "datasets", "accelerate", "peft", "numpy", "pyarrow")
    found = {name: metadata.version(name) for name in names}
    return {"python": platform.python_version(), **found}


def shared_strings(data: Dataset, column: str) -> np.ndarray:
    """`[n]` strings of a column with few distinct values, each value held once."""
    out, known = np.empty(len(data), object), dict[str, str]()
    for start in range(0, len(data), 8192):
        part: dict[str, list[str]] = data.select_columns([column])[start : start + 8192]
        out[start : start + 8192] = [known.setdefault(one, one) for one in part[column]]
    return out
