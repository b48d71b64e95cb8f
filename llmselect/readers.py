"""Files, folders, Hub datasets and lists → raw rows with their origin; a bad line is a finding, not the end."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmselect.errors import LlmselectError, UsageError
from llmselect.formats import Invalid

SUFFIXES = (".jsonl", ".jsonl.gz", ".ndjson", ".json", ".json.gz", ".parquet", ".csv", ".csv.gz")
Raw = tuple[str, Any]  # origin, and the row or the Invalid that it is


def check_source(path: str, where: str) -> None:
    """Refuse a source that is certainly wrong, before anything is loaded.

    Errors: `UsageError`: no such file, an unknown suffix, an empty folder.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        if not folder_files(file):
            raise UsageError(f"{where}: no data files in {path}; looked for {', '.join(SUFFIXES)}")
    elif file.exists():
        if not file.name.lower().endswith(SUFFIXES):
            raise UsageError(f"{where}: {path}: unknown kind of file; allowed: {', '.join(SUFFIXES)}")
    elif means_file(path):
        raise UsageError(f"{where}: no file or folder {path}")


def means_file(path: str) -> bool:
    """Whether the text can only be a path: a Hub id has at most one slash and no data suffix."""
    return path.startswith((".", "/", "~")) or path.count("/") > 1 or path.lower().endswith(SUFFIXES)


def folder_files(folder: Path) -> list[Path]:
    """Data files below a folder, in a fixed order."""
    return sorted(f for f in folder.rglob("*") if f.is_file() and f.name.lower().endswith(SUFFIXES))


def stamps(places: list[str]) -> dict[str, list[int]]:
    """Size and time of every local file among `places`, so that a changed file is noticed."""
    files = [f for p in map(Path, places) if p.exists() for f in (folder_files(p) if p.is_dir() else [p])]
    return {str(f): [f.stat().st_size, f.stat().st_mtime_ns] for f in files}


def read(source: Any, split: str, max_row_bytes: int, subset: str | None = None) -> Iterator[tuple[str, Raw]]:
    """Yield `(default source name, (origin, row))` over a source of any kind; `split` and `subset` are of a Hub dataset."""
    if isinstance(source, str | Path):
        path = Path(source).expanduser()
        if path.exists() or means_file(str(source)):
            check_source(str(source), "pool")
            for file in folder_files(path) if path.is_dir() else [path]:
                stem = file.name.split(".")[0]
                for raw in read_file(file, max_row_bytes):
                    yield stem, raw
            return
        source, name = _hub(str(source), split, subset), str(source).split("/")[-1]
    else:
        name = "dataset"
    for i, row in enumerate(source):
        yield name, (f"{name}[{i}]", row)


def _hub(name: str, split: str, subset: str | None) -> Any:
    from datasets import load_dataset

    try:
        return load_dataset(name, subset, split=split)
    except Exception as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        which = f"split {split!r}" + (f" of subset {subset!r}" if subset else "; some need a subset, e.g. pool.subset=main")
        raise UsageError(f"pool: cannot load dataset {name!r} ({which}) from the Hub: {first}") from error


def read_file(path: Path, max_row_bytes: int) -> Iterator[Raw]:
    """Rows of one file in order; lines that do not parse come as `Invalid` with their line number."""
    name = path.name.lower().removesuffix(".gz")
    try:
        if name.endswith(".parquet"):
            yield from _parquet(path)
        elif name.endswith(".json"):
            yield from _json(path)
        elif name.endswith(".csv"):
            yield from _csv(path)
        else:
            yield from _lines(path, max_row_bytes)
    except (EOFError, gzip.BadGzipFile, OSError) as error:
        raise LlmselectError(f"{path}: the file is truncated or unreadable ({error}); fetch or make it again") from error


def _open(path: Path) -> Any:
    with path.open("rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
    return gzip.open(path, "rb") if zipped else path.open("rb")


def _lines(path: Path, max_row_bytes: int) -> Iterator[Raw]:
    with _open(path) as file:
        number = 0
        while line := file.readline(max_row_bytes + 1):
            number += 1
            origin = f"{path.name}:{number}"
            if len(line) > max_row_bytes and not line.endswith(b"\n"):
                while (rest := file.readline(1 << 20)) and not rest.endswith(b"\n"):
                    pass  # a row of gigabytes must not be held to be refused
                yield origin, Invalid("too_large", f"the row is longer than {max_row_bytes} bytes (max_row_bytes)")
            elif line.strip():
                yield origin, parse(line)


def parse(line: bytes) -> Any:
    """One JSON line as a row, or the `Invalid` that it is."""
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Invalid("invalid_utf8", f"byte {error.start} is not UTF-8")
    except (ValueError, RecursionError) as error:
        return Invalid("invalid_json", f"not JSON: {error}")


def _json(path: Path) -> Iterator[Raw]:
    with _open(path) as file:
        data = file.read()
    parsed = parse(data)
    if isinstance(parsed, Invalid):  # many ".json" files hold one object a line
        yield from _lines(path, len(data) + 1)
        return
    if isinstance(parsed, dict):
        lists = [value for value in parsed.values() if isinstance(value, list) and value and isinstance(value[0], dict)]
        single = any(k in parsed for k in ("messages", "conversations", "instruction", "prompt", "text"))
        parsed = lists[0] if len(lists) == 1 and not single else [parsed]
    for i, row in enumerate(parsed if isinstance(parsed, list) else [parsed]):
        yield f"{path.name}[{i}]", row


def _csv(path: Path) -> Iterator[Raw]:
    csv.field_size_limit(1 << 30)
    with _open(path) as file:
        rows = csv.DictReader(io.TextIOWrapper(file, "utf-8", errors="surrogateescape", newline=""))
        for i, row in enumerate(rows):
            yield f"{path.name}:{i + 2}", {k: v for k, v in row.items() if k is not None}


def _parquet(path: Path) -> Iterator[Raw]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise LlmselectError(f"{path}: not a readable parquet file: {error}") from error
    index = 0
    for batch in file.iter_batches(batch_size=1000):
        for row in batch.to_pylist():
            yield f"{path.name}[{index}]", row
            index += 1
