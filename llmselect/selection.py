"""Selection: the rows chosen, in rank order, with their scores, the evidence for each, and how they came about."""

from __future__ import annotations

# datasets and pyarrow have no types.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
import hashlib
import importlib
import io
import json
import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmselect import atomic
from llmselect.errors import LlmselectError, UsageError
from llmselect.plain import is_mapping

if TYPE_CHECKING:
    from datasets import Dataset

    from llmselect.notebook import Table
    from llmselect.plots import Plots

_ALLOWED = 'give a number of rows, "5%", {fraction: 0.05} or {tokens: 200000}'


@dataclass(frozen=True)
class Budget:
    """How much to select: exactly one of `rows`, `fraction` in (0, 1], `tokens` (supervised tokens)."""

    rows: int | None = None
    fraction: float | None = None
    tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("rows", "fraction", "tokens"):
            object.__setattr__(self, name, _plain(getattr(self, name)))
        given: list[Any] = [v for v in (self.rows, self.fraction, self.tokens) if v is not None]
        if len(given) != 1 or isinstance(given[0], bool) or not isinstance(given[0], int | float):
            raise UsageError(f"a budget has exactly one of rows, fraction, tokens; {_ALLOWED}")
        if not given[0] > 0 or given[0] == float("inf"):
            raise UsageError(f"{given[0]} is not a positive budget; {_ALLOWED}")
        if self.fraction is not None and self.fraction > 1:
            raise UsageError(f"{self.fraction:.0%} is more than the whole pool; {_ALLOWED}")
        if any(v is not None and v != int(v) for v in (self.rows, self.tokens)):
            raise UsageError(f"{given[0]} is not a whole number of rows or tokens; {_ALLOWED}")

    @classmethod
    def parse(cls, value: Any) -> Budget:
        """From `5000`, `"5%"`, `0.05`, a mapping, or a Budget.

        Errors: `UsageError` for anything else, for nothing, and for more than everything.
        """
        if isinstance(value, Budget):
            return value
        value = _plain(value)
        if is_mapping(value):
            if unknown := set(value) - {"rows", "fraction", "tokens"}:
                raise UsageError(f"{sorted(map(str, unknown))[0]!r} is no kind of budget; {_ALLOWED}")
            return cls(**value)
        if isinstance(value, str):
            if match := re.fullmatch(r"\s*(-?\d+(?:\.\d+)?)\s*%\s*", value):
                return cls(fraction=float(match[1]) / 100)
            if match := re.fullmatch(r"\s*(-?\d+)\s*", value):
                return cls(rows=int(match[1]))
            raise UsageError(f"{reprlib.repr(value)} is not a budget; {_ALLOWED}")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UsageError(f"{reprlib.repr(value)} is not a budget; {_ALLOWED}")
        if isinstance(value, float) and 0 < value < 1:
            return cls(fraction=value)
        return cls(rows=value)  # pyright: ignore[reportArgumentType] - __post_init__ refuses 2.5

    def rows_of(self, n: int) -> int:
        """Rows of a pool of `n`: never over, at least one. Errors: `UsageError` when the pool is smaller."""
        if self.rows is not None:
            if self.rows > n:
                raise UsageError(f"a budget of {self.rows} rows is more than the {n} rows of the pool")
            return int(self.rows)
        assert self.fraction is not None, "a token budget has no number of rows of its own"
        return max(1, int(self.fraction * n + 1e-9))

    def plain(self) -> dict[str, Any]:
        """As a mapping with its one key."""
        return {k: v for k, v in (("rows", self.rows), ("fraction", self.fraction), ("tokens", self.tokens)) if v is not None}


def _plain(value: Any) -> Any:
    """A number of NumPy, as arithmetic on arrays gives them, as one of Python; anything else as it is."""
    return value.item() if hasattr(value, "item") and not np.ndim(value) else value


def _checksum(about: Mapping[str, Any]) -> str:
    rest = {k: v for k, v in about.items() if k != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _frozen(array: Any) -> np.ndarray:
    """A read-only copy: nobody else's array changes with it, or becomes read-only."""
    copy = np.array(array)
    copy.flags.writeable = False
    return copy


@dataclass(frozen=True, eq=False)
class Selection:
    """A frozen selection.

    `indices [k]` int64 in rank order; `n` rows of the pool; `scores` `[n]` or `[n, G]` of the whole pool, the losers'
    too; `weights [k]`; `evidence` arrays `[k, …]` aligned with `indices`: why each row was picked; `nested`: whether
    its prefixes are the selections of smaller budgets; `ids [k]`; `provenance`: how it was made.
    """

    indices: np.ndarray
    n: int
    scores: np.ndarray | None = None
    weights: np.ndarray | None = None
    evidence: Mapping[str, np.ndarray] = field(default_factory=dict[str, np.ndarray])
    nested: bool = True
    provenance: Mapping[str, Any] = field(default_factory=dict[str, Any])
    ids: Sequence[str] | None = None

    def __post_init__(self) -> None:
        indices = np.asarray(self.indices, np.int64)
        if len(np.unique(indices)) != len(indices) or (len(indices) and not 0 <= indices.min() <= indices.max() < self.n):
            raise LlmselectError(f"a selection holds distinct rows of 0 … {self.n - 1}")
        object.__setattr__(self, "indices", _frozen(indices))
        for name in ("scores", "weights"):
            if (array := getattr(self, name)) is not None:
                object.__setattr__(self, name, _frozen(array))
        object.__setattr__(self, "evidence", {name: _frozen(array) for name, array in self.evidence.items()})

    def __len__(self) -> int:
        return len(self.indices)

    def __repr__(self) -> str:
        return f"Selection({len(self)} of {self.n} rows by {self.provenance.get('selector', 'hand')})"

    def _repr_html_(self) -> str:
        from llmselect.notebook import selection_html

        return selection_html(self)

    def show(self, pool: Dataset, rows: int = 5, start: int = 0) -> Table:
        """For a notebook: the texts of the rows from rank `start`, with their sources, scores and evidence.

        Errors: `LlmselectError` when `pool` is not the pool selected from.
        """
        from llmselect.notebook import rows_table

        return rows_table(self, pool, rows, start)

    @property
    def plot(self) -> Plots:
        """Figures (extra `report`): `plot.sources(pool)`, `plot.lengths(cost)`, `plot.scores()`."""
        from llmselect.plots import Plots

        return Plots(self)

    def repetitions(self, total: int | None = None) -> np.ndarray:
        """How often each row should be trained on, `[k]` int64: `weights` as whole numbers that sum to `total` (default k),
        by largest remainder, ties to the better rank. Without weights all rows count alike."""
        weights = np.ones(len(self)) if self.weights is None else np.asarray(self.weights, np.float64)
        if not (np.isfinite(weights).all() and (weights >= 0).all() and weights.sum() > 0):
            raise LlmselectError("weights must be finite, not negative and not all zero to become repetitions")
        quota = (len(self) if total is None else total) * weights / weights.sum()
        counts = np.floor(quota + 1e-9).astype(np.int64)
        left = round(quota.sum()) - int(counts.sum())
        counts[np.argsort(-(quota - counts), kind="stable")[:left]] += 1
        return counts

    def to_dataset(self, pool: Dataset, repeat: bool = False) -> Dataset:
        """The selected rows of `pool` in rank order; with `repeat` each as often as `repetitions` says.

        Errors: `LlmselectError` when `pool` is not the pool selected from.
        """
        if len(pool) != self.n:
            raise LlmselectError(f"this selection is from a pool of {self.n} rows, the one given has {len(pool)}")
        chosen = pool.select(self.indices)
        if self.ids is not None and "id" in chosen.column_names and [*chosen["id"]] != [*self.ids]:
            raise LlmselectError("the ids of this pool's rows are not those selected: it is another pool, or reordered")
        return chosen.select(np.repeat(np.arange(len(self)), self.repetitions())) if repeat else chosen

    def push_to_hub(self, repo: str, pool: Dataset, **options: Any) -> Any:
        """Push the selected rows of `pool` to the Hub with a card; options, result and errors of
        `llmselect.hub.push_selection`: `private`, `create_pr`, `dry_run`, `source`."""
        # By name: a selection knows nothing of what is built upon it, this one word to it is for the user.
        return importlib.import_module("llmselect.hub").push_selection(self, repo, pool, **options)

    def prefix(self, k: int) -> Selection:
        """The selection at a smaller budget, at no cost."""
        if not self.nested or not 0 < k <= len(self):
            raise UsageError(
                f"prefix({k}): "
                + ("this method's selections are not nested; select again" if not self.nested else f"give 1 to {len(self)} rows")
            )
        cut = {name: values[:k] for name, values in self.evidence.items()}
        return replace(
            self,
            indices=self.indices[:k],
            evidence=cut,
            ids=None if self.ids is None else list(self.ids[:k]),
            weights=None if self.weights is None else self.weights[:k],
        )

    def overlap(self, other: Selection) -> float:
        """Jaccard overlap |A ∩ B| / |A ∪ B| of two selections from one pool."""
        if other.n != self.n:
            raise UsageError(f"selections from pools of {self.n} and {other.n} rows cannot be compared")
        both = len(np.intersect1d(self.indices, other.indices))
        return both / max(1, len(self) + len(other) - both)

    def save(self, folder: Path | str) -> None:
        """Write `selected.parquet` (rank, index, id, weight, evidence), `scores.npy`, `selection.json`: the same bytes
        for the same selection."""
        files = {"selected.parquet": self._table()}
        if self.scores is not None:
            buffer = io.BytesIO()
            np.save(buffer, self.scores, allow_pickle=False)
            files["scores.npy"] = buffer.getvalue()
        about: dict[str, Any] = {
            "n": self.n,
            "nested": self.nested,
            "provenance": dict(self.provenance),
            "evidence": {name: str(array.dtype) for name, array in self.evidence.items()},
            "sha256": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
        }
        about["checksum"] = _checksum(about)
        with atomic.replace_dir(folder) as beside:
            for name, data in files.items():
                (beside / name).write_bytes(data)
            atomic.write_json(beside / "selection.json", about)

    def _table(self) -> bytes:
        import pyarrow
        import pyarrow.parquet

        pa: Any = pyarrow
        pq: Any = pyarrow.parquet
        columns: dict[str, Any] = {"rank": np.arange(len(self)), "index": self.indices}
        if self.ids is not None:
            columns["id"] = list(self.ids)
        if self.weights is not None:
            columns["weight"] = self.weights
        columns |= {f"evidence_{k}": v if np.ndim(v) == 1 else np.asarray(v).tolist() for k, v in sorted(self.evidence.items())}
        buffer = io.BytesIO()
        pq.write_table(pa.table(columns), buffer)
        return buffer.getvalue()

    @classmethod
    def load(cls, folder: Path | str) -> Selection:
        """Read what `save` wrote. Errors: `LlmselectError` naming a missing or damaged file."""
        import pyarrow.parquet

        pq: Any = pyarrow.parquet
        folder = Path(folder)
        if not (folder / "selection.json").exists():
            raise LlmselectError(f"{folder} holds no selection (no selection.json)")
        about: dict[str, Any]
        try:
            text = (folder / "selection.json").read_bytes()
            about = json.loads(text)
            # The text too: the last digit of a number may change without the number.
            intact = about.get("checksum") == _checksum(about) and text == atomic.json_text(about).encode()
        except (ValueError, AttributeError):
            about, intact = {}, False
        if not intact:
            raise LlmselectError(f"{folder / 'selection.json'} is damaged; delete {folder} and select again")
        for name, digest in about["sha256"].items():
            if not (folder / name).exists() or atomic.sha256_file(folder / name) != digest:
                raise LlmselectError(f"{folder / name} is missing or damaged; delete {folder} and select again")
        table = pq.read_table(folder / "selected.parquet")
        column = {name: table[name] for name in table.column_names}
        evidence = {k: np.array(column[f"evidence_{k}"].to_pylist(), dtype) for k, dtype in about["evidence"].items()}
        scores = np.load(folder / "scores.npy", allow_pickle=False) if "scores.npy" in about["sha256"] else None
        return cls(
            column["index"].to_numpy(),
            about["n"],
            scores,
            column["weight"].to_numpy() if "weight" in column else None,
            evidence,
            about["nested"],
            about["provenance"],
            column["id"].to_pylist() if "id" in column else None,
        )
