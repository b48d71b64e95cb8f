"""Selections as parquet: the selected rows in rank order, the scores of the whole pool, and the sources on both sides."""

from __future__ import annotations

# pyarrow and datasets have no types.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmselect.hub.origin import NOT_STATED, clean
from llmselect.selection import Selection

if TYPE_CHECKING:
    from datasets import Dataset

BATCH = 1000
OTHERS = "all others"


@dataclass(frozen=True)
class Subset:
    """One selection under the `name` that it has as a configuration; `checksum` is that of its folder, if it has one."""

    name: str
    method: str
    selection: Selection
    checksum: str | None = None

    @property
    def about(self) -> dict[str, Any]:
        """How it was made: selector, its settings, seed, budget, and in a run what it reads."""
        told = self.selection.provenance
        key = {**{k: told.get(k) for k in ("selector", "config", "seed", "budget")}, **told.get("key", {})}
        return clean({name: value for name, value in key.items() if name != "features"})

    @property
    def settings(self) -> dict[str, Any]:
        """The selector's settings, and the limits and the removal of duplicates around it."""
        return {**(self.about.get("config") or {}), **{k: self.about[k] for k in ("limits", "dedup") if k in self.about}}


def subset(selection: Selection, checksum: str | None = None) -> Subset:
    """`selection` named by method, seed and budget, in letters that a file and a configuration may have."""
    told = selection.provenance
    method = str(told.get("method") or told.get("selector") or "selection")
    kind, amount = next(iter((told.get("budget") or {"rows": len(selection)}).items()))
    size = f"{100 * amount:g}pct" if kind == "fraction" else f"{amount}{kind}"
    seed = f"-seed-{told['seed']}" if "seed" in told else ""
    return Subset(re.sub(r"[^A-Za-z0-9_+.-]", "-", f"{method}{seed}-{size}"), method, selection, checksum)


def write_rows(one: Subset, pool: Dataset, file: Path) -> None:
    """The selected rows with rank, score, weight and evidence, as parquet; a batch at a time, so that RAM stays small."""
    import pyarrow.parquet as pq

    selection = one.selection
    chosen = selection.to_dataset(pool).with_format("arrow")
    extra: dict[str, np.ndarray] = {"rank": np.arange(len(selection))}
    if selection.scores is not None:
        extra["score"] = selection.scores[selection.indices]
    if selection.weights is not None:
        extra["weight"] = selection.weights
    extra |= {f"evidence_{name}": values for name, values in sorted(selection.evidence.items())}
    taken = set(pool.column_names)
    extra = {f"selected_{name}" if name in taken else name: values for name, values in extra.items()}
    schema = _schema(chosen.features.arrow_schema, extra)
    with pq.ParquetWriter(file, schema) as writer:
        for start in range(0, len(selection), BATCH):
            table: Any = chosen[start : start + BATCH]
            for name, values in extra.items():
                table = table.append_column(name, _column(values[start : start + BATCH], schema.field(name).type))
            writer.write_table(table.select(schema.names).cast(schema))


def _schema(rows: Any, extra: Mapping[str, np.ndarray]) -> Any:
    """Rank first, then the pool's columns, then the rest. Without the metadata that tells `datasets` of other columns."""
    import pyarrow as pa

    ours = [pa.field(name, _type(values)) for name, values in extra.items()]
    return pa.schema([ours[0], *rows.remove_metadata(), *ours[1:]])


def _type(values: np.ndarray) -> Any:
    import pyarrow as pa

    if values.dtype.kind in "OUS":
        found = pa.string()
    else:  # few readers know half precision
        found = pa.from_numpy_dtype(np.dtype(np.float32) if values.dtype == np.float16 else values.dtype)
    for _ in range(values.ndim - 1):
        found = pa.list_(found)
    return found


def _column(values: np.ndarray, kind: Any) -> Any:
    import pyarrow as pa

    if values.ndim > 1 or values.dtype.kind in "OUS":
        return pa.array(values.tolist(), kind)
    return pa.array(values.astype(np.float32) if values.dtype == np.float16 else values, kind)


def write_scores(subsets: Sequence[Subset], pool: Dataset, file: Path) -> bool:
    """Ids and scores of every row of the pool, a column per selection that has scores; False if none has."""
    import pyarrow
    import pyarrow.parquet as pq

    pa: Any = pyarrow
    scored = {one.name: one.selection.scores for one in subsets if one.selection.scores is not None}
    if not scored:
        return False
    schema = pa.schema([("id", pa.string()), *((name, _type(values)) for name, values in scored.items())])
    ids = pool.select_columns(["id"])
    with pq.ParquetWriter(file, schema) as writer:
        for start in range(0, len(pool), 100 * BATCH):
            part = slice(start, start + 100 * BATCH)
            columns = [pa.array(ids[part]["id"], pa.string())]
            columns += [_column(values[part], schema.field(name).type) for name, values in scored.items()]
            writer.write_table(pa.table(columns, schema=schema))
    return True


@dataclass(frozen=True)
class Mix:
    """Rows by source: of the pool, and the share of each source on every side (the pool, then the methods)."""

    sources: list[str]
    shares: dict[str, list[float]]

    def lines(self) -> Iterator[tuple[str, list[str]]]:
        """Table rows: a source and its shares in per cent."""
        for i, source in enumerate(self.sources):
            yield source, [f"{100 * values[i]:.1f} %" for values in self.shares.values()]


def mix(subsets: Sequence[Subset], pool: Dataset, most: int = 20) -> Mix | None:
    """The sources of pool and selections, the `most` frequent by name; seeds are averaged. None without sources."""
    if "source" not in pool.column_names:
        return None
    known: dict[str, int] = {}
    numbers = np.empty(len(pool), np.int64)
    narrow = pool.select_columns(["source"])
    for start in range(0, len(pool), BATCH):
        part: dict[str, list[Any]] = narrow[start : start + BATCH]
        names = part["source"]
        numbers[start : start + len(names)] = [known.setdefault(clean(str(name or NOT_STATED)), len(known)) for name in names]
    counts = Counter(numbers.tolist())
    names = list(known)
    order = sorted(counts, key=lambda one: (-counts[one], names[one]))
    shown, rest = order[:most], order[most:]

    def shares(rows: np.ndarray) -> list[float]:
        found = np.bincount(rows, minlength=len(known)) / max(1, len(rows))
        return [*(float(found[one]) for one in shown), *([float(found[rest].sum())] if rest else [])]

    sides: dict[str, list[list[float]]] = {}
    for one in subsets:
        sides.setdefault(one.method, []).append(shares(numbers[one.selection.indices]))
    averaged = {method: np.mean(values, axis=0).tolist() for method, values in sides.items()}
    return Mix([names[one] for one in shown] + ([OTHERS] if rest else []), {"pool": shares(numbers), **averaged})
