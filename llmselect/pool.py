"""Pools and targets: any instruction data → a `datasets.Dataset` with `id`, `messages`, `source` (and `group`).

Rows are streamed: the pool lies in an Arrow file that is memory-mapped, and RAM holds 16 bytes a row while duplicates are
looked for. Every row is accounted for: read = kept + invalid + duplicates + contaminated.
"""

from __future__ import annotations

# datasets and pyarrow have no types.
# pyright: reportMissingTypeStubs=false
import atexit
import hashlib
import json
import logging
import os
import reprlib
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmselect import atomic
from llmselect.decontaminate import Contamination
from llmselect.errors import LlmselectError
from llmselect.formats import Invalid, Message, check_columns, to_messages
from llmselect.readers import Raw, read

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger("llmselect")
BATCH = 1000
Row = tuple[str, str, str | None, list[Message]]  # id (before it is known: origin), source, licence, messages
_EXCERPT = reprlib.Repr()  # of rows of any depth and size
_EXCERPT.maxlevel, _EXCERPT.maxdict, _EXCERPT.maxstring, _EXCERPT.maxother = 4, 8, 200, 100


def content_id(messages: list[Message]) -> str:
    """The identity of a row: the first 16 bytes, in hex, of the SHA-256 of its canonical messages."""
    plain = json.dumps([[m["role"], m["content"]] for m in messages], ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(plain.encode()).hexdigest()[:32]


@dataclass
class PoolReport:
    """What became of the rows read; `reasons` counts the invalid ones, `quarantine` names the file of all rejected."""

    read: int = 0
    kept: int = 0
    invalid: int = 0
    duplicates: int = 0
    contaminated: int = 0
    remembered: int = 0  # of those kept, rows of a memory
    reasons: Counter[str] = field(default_factory=Counter[str])
    quarantine: Path | None = None
    examples: list[str] = field(default_factory=list[str])

    def describe(self) -> str:
        """One line for a person."""
        return (f"{self.read} rows read = {self.kept} kept + {self.duplicates} duplicates + {self.contaminated} "
                f"contaminated + {self.invalid} invalid {dict(self.reasons) or ''}").rstrip()  # fmt: skip

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        told = {**asdict(self), "reasons": dict(self.reasons), "quarantine": self.quarantine and self.quarantine.name}
        return {key: value for key, value in told.items() if (key, value) != ("remembered", 0)}


@dataclass
class _Quarantine:
    """Rejected rows, one JSON object a line, complete or absent."""

    path: Path
    report: PoolReport

    def __post_init__(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.beside = self.path.with_name(f".{self.path.name}.{os.getpid()}.part")
        self.file = self.beside.open("w", encoding="utf-8", errors="backslashreplace")  # names of files may be any bytes

    def add(self, kind: str, reason: str, detail: str, origin: str, row_id: str | None, excerpt: str) -> None:
        safe = excerpt[:200].encode("utf-8", "backslashreplace").decode()
        entry = {"kind": kind, "reason": reason, "detail": detail[:300].encode("utf-8", "backslashreplace").decode(),
                 "origin": origin, "id": row_id, "excerpt": safe}  # fmt: skip
        self.file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        if kind == "invalid":
            self.report.invalid += 1
            self.report.reasons[reason] += 1
            if len(self.report.examples) < 3:
                self.report.examples.append(f"{origin}: {reason}: {detail[:160]}")

    def close(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        os.replace(self.beside, self.path)
        self.report.quarantine = self.path

    def drop(self) -> None:
        """Leave nothing of a reading that did not come to its end."""
        with suppress(OSError):
            self.file.close()
        self.beside.unlink(missing_ok=True)


def read_pool(source: Any, *, columns: Mapping[str, str] | None = None, group: str | None = None, split: str = "train",
              subset: str | None = None, source_name: str | None = None, limit: int | None = None, max_invalid: float = 0.001,
              max_row_bytes: int = 1_000_000, workdir: Path | str | None = None, against: Iterable[Dataset] = (),
              quarantine: Path | str | None = None, memory: Iterable[Any] = ()) -> tuple[Dataset, PoolReport]:  # fmt: skip
    """`load_pool`, with the account of every row."""
    check_columns(columns)
    folder = Path(workdir) if workdir else _temporary()
    folder.mkdir(parents=True, exist_ok=True)
    report = PoolReport()
    rejects = _Quarantine(Path(quarantine or folder / "quarantine.jsonl"), report)
    contamination = Contamination()
    for data in against:
        contamination.add(data)
    earlier = (("memory", (f"memory[{i}]", row)) for i, row in enumerate(memory))
    old = _accepted(earlier, None, None, None, max_row_bytes, report, rejects)
    rows = _accepted(read(source, split, max_row_bytes, subset), columns, source_name, limit, max_row_bytes, report, rejects)
    clean = _distinct(old, rows, contamination, report, rejects)
    try:
        file = _write(folder / "pool.arrow", clean, group, report)
        rejects.close()
    except BaseException:
        rejects.drop()
        raise
    if report.invalid > max_invalid * report.read:
        raise LlmselectError(
            f"{report.invalid} of {report.read} rows are invalid, more than max_invalid = {max_invalid:.3%}: "
            f"{dict(report.reasons)}\n  " + "\n  ".join(report.examples)
            + f"\nAll of them are in {report.quarantine}. Mend the data, or allow more: pool.max_invalid=0.05"
        )  # fmt: skip
    if not report.kept:
        raise LlmselectError(f"no usable rows in {source}: {report.describe()}")
    log.info("%s: %s", source if isinstance(source, str | Path) else "pool", report.describe())
    return open_rows(file), report


def open_rows(file: Path) -> Dataset:
    """The rows of an Arrow file that `read_pool` wrote; they have a column `license` if any row states one."""
    from datasets import Dataset

    data: Any = Dataset.from_file(str(file))
    if "license" in data.column_names and data.data.column("license").null_count == len(data):
        data = data.remove_columns("license")
    return data


def _temporary() -> Path:
    """A folder that goes when the process ends, but for a quarantine with something in it."""
    folder = Path(tempfile.mkdtemp(prefix="llmselect-pool-"))

    def tidy() -> None:
        for file in folder.iterdir():
            if file.name != "quarantine.jsonl" or not file.stat().st_size:
                file.unlink()
        if not any(folder.iterdir()):
            folder.rmdir()

    atexit.register(tidy)
    return folder


def load_pool(source: Any, **options: Any) -> Dataset:
    """Read instruction data of any recognised format into a `datasets.Dataset`.

    Args:
        source: a Hub dataset id; a json, jsonl, parquet or csv file (also .gz) or a folder of them; a `Dataset` or any
            iterable of rows.
        columns: a column map such as `{"prompt": "question", "response": "answer"}`, where the names are not known.
        group: makes it a target: the task that its rows belong to.
        split, subset: of a Hub dataset (`subset` is the configuration, e.g. `main`).
        source_name: `source` of rows that name none.
        limit: read only the first rows.
        max_invalid: share of invalid rows above which loading stops, with examples.
        max_row_bytes: a longer row is invalid.
        workdir: where the Arrow file and the quarantine go; by default a temporary folder that goes with the process,
            but for rejected rows.
        against: evaluation sets; rows that share text with them are dropped.
        quarantine: the file of rejected rows, each with its reason and origin.
        memory: rows of an earlier pool, which come first and do not count for `limit`; a new row that is one of them is a
            duplicate. Select with another seed then: a row that its draw brought in once would come in by it again.

    Errors: `UsageError` for a source that is not there; `LlmselectError` above `max_invalid`.
    """
    return read_pool(source, **options)[0]


def _accepted(raws: Iterable[tuple[str, Raw]], columns: Mapping[str, str] | None, source_name: str | None,
              limit: int | None, max_row_bytes: int, report: PoolReport, rejects: _Quarantine) -> Iterator[Row]:  # fmt: skip
    """Valid rows as (origin, source, licence, messages)."""
    before = report.read
    for stem, (origin, row) in raws:
        if limit is not None and report.read - before >= limit:
            return
        report.read += 1
        try:
            if isinstance(row, Invalid):
                raise row
            messages = to_messages(row, columns)
            if sum(len(m["content"].encode()) for m in messages) > max_row_bytes:
                raise Invalid("too_large", f"the row is longer than {max_row_bytes} bytes (max_row_bytes)")
        except Invalid as found:
            text = "" if isinstance(row, Invalid) else _EXCERPT.repr(row)
            rejects.add("invalid", found.reason, found.detail, origin, None, text)
            continue
        named = row.get((columns or {}).get("source", "source"))
        stated = row.get((columns or {}).get("license", "license"), row.get("licence"))
        licence = _sound(stated.strip()) or None if isinstance(stated, str) else None
        yield origin, source_name or (_sound(named) if isinstance(named, str) and named else stem), licence, messages


def _sound(text: str) -> str:
    """Text without halves of surrogate pairs, which no file can hold."""
    return text.encode("utf-8", "replace").decode()


def _distinct(old: Any, rows: Any, contamination: Contamination, report: PoolReport, rejects: _Quarantine) -> Iterator[Row]:
    """Rows seen for the first time and clean of evaluation text, as (id, source, licence, messages), the old ones first."""
    seen = Seen()
    for is_old, (origin, source, licence, messages) in chain(((True, r) for r in old), ((False, r) for r in rows)):
        row_id = content_id(messages)
        digest = bytes.fromhex(row_id)
        excerpt = messages[-1]["content"]
        if not seen.add(digest):
            report.duplicates += 1
            rejects.add("duplicate", "duplicate", "the same conversation came before", origin, row_id, excerpt)
            continue
        if found := contamination.find(messages):
            report.contaminated += 1
            rejects.add("contaminated", "contaminated", found, origin, row_id, excerpt)
            continue
        report.kept += 1
        report.remembered += is_old
        yield row_id, source, licence, messages


class Seen:
    """A set of 16-byte digests in 16 bytes each: a set of Python objects takes 100, which is gigabytes at 10⁷ rows.

    New digests wait in a small set; when it is full they become a sorted run, and runs of like size are merged, so that
    a look-up is a binary search in O(log n) runs.
    """

    def __init__(self, waiting: int = 1 << 14):
        self.limit, self.waiting, self.runs = waiting, set[bytes](), list[np.ndarray]()

    def add(self, digest: bytes) -> bool:
        """Whether `digest` is new; it is no longer."""
        if digest in self.waiting or any(self._holds(run, digest) for run in self.runs):
            return False
        self.waiting.add(digest)
        if len(self.waiting) == self.limit:
            run = np.sort(np.array(list(self.waiting), "S16"))
            while self.runs and len(self.runs[-1]) <= len(run):
                run = np.sort(np.concatenate([self.runs.pop(), run]), kind="stable")
            self.runs.append(run)
            self.waiting.clear()
        return True

    @staticmethod
    def _holds(run: np.ndarray, digest: bytes) -> bool:
        at = int(run.searchsorted(np.bytes_(digest)))
        # NumPy drops trailing zero bytes of a scalar, on both sides alike.
        return at < len(run) and bytes(run[at]) == digest.rstrip(b"\0")


def _write(path: Path, rows: Iterator[Row], group: str | None, report: PoolReport) -> Path:
    """Stream rows into an Arrow file, complete or absent."""
    import pyarrow

    pa: Any = pyarrow
    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    last = "group" if group else "license"  # targets are never passed on, so nobody asks for their licence
    schema = pa.schema([("id", pa.string()), ("messages", pa.list_(message)), ("source", pa.string()), (last, pa.string())])
    with atomic.beside(path) as file, pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        batch: list[dict[str, Any]] = []
        for row_id, source, licence, messages in rows:
            batch.append({"id": row_id, "messages": messages, "source": source, last: group or licence})
            if len(batch) == BATCH:
                writer.write_batch(pa.RecordBatch.from_pylist(batch, schema))
                batch = []
        if batch:
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema))
    return path
