"""A number or tags that the rows' own files state: quality scores, difficulties, labels.

Paper: none; Deita (arXiv 2312.15685), MIG (arXiv 2504.13835), InsTag (arXiv 2308.07074) and MASS (arXiv 2503.14917) take such
    columns.
Objective: `number`: `value` = what the row's field holds; `tags`: `value`_ij = 1 if the field (a text or a list of texts) holds
    tag j, tags in alphabetical order.
Inputs: the files (or Hub datasets) of the pool, and of the targets for methods that read tags of both; rows are found again by
    their messages. No tokenizer, no model.
Cost: one more reading of the files, and 16 bytes and the value of every row in memory.
Deviations: of rows with the same messages the first one counts. A row without a number is left out of selections, a row without
    tags has none.
Defaults: numbers; every tag that stands in at least one row.
Use: scores or tags are there already: from a published dataset, from another tool.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from llmselect.arrays import Csr
from llmselect.engine.extractor import Arrays, Extractor, State
from llmselect.errors import UsageError, nearest
from llmselect.plain import is_sequence
from llmselect.registry import extractors

if TYPE_CHECKING:
    from llmselect.engine.backbone import Backbone

Held = dict[bytes, Any]  # row id → number, or tuple of tags


@extractors.register("column")
@dataclass(frozen=True, kw_only=True)
class Column(Extractor):
    """Array `value`: `[n]` float32 numbers, or `[n, tags]` float32, sparse."""

    files: tuple[str, ...] = field(metadata={"help": "files, folders or Hub ids that hold the rows: those of pool and targets"})
    column: str = field(metadata={"help": "the field of a row"})
    kind: Literal["number", "tags"] = field(default="number", metadata={"help": "what it holds"})
    columns: dict[str, str] | None = field(default=None, metadata={"help": "column map of the messages, as pool.columns"})
    split: str = field(default="train", metadata={"help": "of Hub datasets"})
    least: int = field(default=1, metadata={"help": "rows that a tag must stand in, over all files, to be kept"})

    def __post_init__(self) -> None:
        if not self.files or self.least < 1:
            raise UsageError("files: give at least one; least must be at least 1")

    def views(self) -> tuple[str, ...]:
        return ()

    def layers(self, state: State = MappingProxyType({})) -> tuple[int, ...]:
        return ()

    def settings(self) -> dict[str, Any]:
        total = hashlib.sha256()
        for row, value in sorted(self._held().items()):
            total.update(row + json.dumps(value).encode())
        return {"column": self.column, "kind": self.kind, "least": self.least, "values": total.hexdigest()}

    def arrays(self, backbone: Backbone, groups: Sequence[str]) -> Arrays:
        return {"value": ("float32", ())} if self.kind == "number" else {"value": ("csr:float32", (len(self.tags()),))}

    def tags(self) -> list[str]:
        """The tags in the order of the columns. Errors: `UsageError` when there are none."""
        count = Counter(tag for tags in self._held().values() for tag in tags)
        found = sorted(tag for tag, rows in count.items() if rows >= self.least)
        if not found:
            raise UsageError(f"column: no tag of '{self.column}' stands in {self.least} rows or more")
        return found

    def texts(self, messages: Sequence[list[dict[str, str]]]) -> dict[str, Any]:
        from llmselect.pool import content_id

        held, rows = self._held(), [bytes.fromhex(content_id(row)) for row in messages]
        if self.kind == "number":
            return {"value": np.array([held.get(row, np.nan) for row in rows], np.float32)}
        place = {tag: i for i, tag in enumerate(self.tags())}
        columns = [np.array(sorted(place[tag] for tag in held.get(row, ()) if tag in place), np.int32) for row in rows]
        return {"value": Csr.of_rows([(one, np.ones(len(one))) for one in columns], len(place), np.float32)}

    def _held(self) -> Held:
        columns = tuple(sorted((self.columns or {}).items()))
        return _read(self.files, self.column, self.kind, columns, self.split, _stamp(self.files))


def _stamp(files: Sequence[str]) -> str:
    from llmselect.readers import stamps

    return json.dumps(stamps([str(Path(one).expanduser()) for one in files]), sort_keys=True)


@lru_cache(maxsize=4)
def _read(files: tuple[str, ...], column: str, kind: str, columns: tuple[tuple[str, str], ...], split: str, stamp: str) -> Held:
    """The value of every row of the files by its id; `stamp` makes a changed file another one."""
    from llmselect.formats import Invalid, to_messages
    from llmselect.pool import content_id
    from llmselect.readers import read

    held: Held = {}
    fields: set[str] = set()
    for file in files:
        for _, (origin, row) in read(file, split, 1 << 40):
            try:
                if isinstance(row, Invalid):
                    continue
                messages = to_messages(row, dict(columns) or None)
            except Invalid:  # such a row is not in the pool either
                continue
            fields |= row.keys()
            if row.get(column) is not None:
                held.setdefault(bytes.fromhex(content_id(messages)), _value(row[column], kind, column, origin))
    if column not in fields:
        raise UsageError(f"column: no row of {', '.join(files)} has a field '{column}'.{nearest(column, sorted(fields))} "
                         f"There are: {', '.join(sorted(fields))}")  # fmt: skip
    return held


def _value(value: Any, kind: str, column: str, origin: str) -> Any:
    if kind == "number" and isinstance(value, int | float):
        return float(value)
    if kind == "tags" and (isinstance(value, str) or is_sequence(value)):
        tags = [value] if isinstance(value, str) else value
        if all(isinstance(tag, str) for tag in tags):
            return tuple(dict.fromkeys(tags))
    wanted = "a number" if kind == "number" else "a text or a list of texts"
    raise UsageError(f"column: '{column}' of {origin} holds {str(value)[:40]!r}, not {wanted}")
