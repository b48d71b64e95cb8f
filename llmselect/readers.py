"""Files, folders, Hub datasets and lists → raw rows with their origin; a bad row is a finding, not the end."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from llmselect.errors import LlmselectError, UsageError, nearest
from llmselect.formats import CONVERSATIONS, Invalid, check_found, wanted

SUFFIXES = (".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz", ".json", ".json.gz", ".parquet", ".csv", ".csv.gz")
# Endings that a Hub id does not have. A dot alone says nothing: "org/Name-2.5" is an id.
FILE_ENDINGS = (*SUFFIXES, ".txt", ".tsv", ".xlsx", ".xls", ".yaml", ".yml", ".xml", ".gz", ".zst", ".bz2", ".xz", ".zip",
                ".tar", ".arrow", ".feather", ".pkl", ".npy")  # fmt: skip
Raw = tuple[str, Any]  # origin, and the row or the Invalid that it is
Columns = Mapping[str, str] | None
_ROWS = 256  # rows decoded at a time: a table may hold a megabyte in each


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
        beside = [f.name for f in file.parent.iterdir()] if file.parent.is_dir() else []
        raise UsageError(f"{where}: no file or folder {path}.{nearest(file.name, beside)} Give a file ({', '.join(SUFFIXES)}), "
                         "a folder of such files, or a Hub dataset such as org/name")  # fmt: skip


def means_file(path: str) -> bool:
    """Whether the text can only be a path: a Hub id has at most one slash and no data suffix."""
    return path.startswith((".", "/", "~")) or path.count("/") > 1 or path.lower().endswith(FILE_ENDINGS)


def folder_files(folder: Path) -> list[Path]:
    """Data files below a folder, in a fixed order; hidden ones are left out."""
    return sorted(
        file
        for file in folder.rglob("*")
        if file.name.lower().endswith(SUFFIXES)
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )


def stamps(places: list[str]) -> dict[str, list[int]]:
    """Size and time of every local file among `places`, so that a changed file is noticed."""
    files = [f for p in map(Path, places) if p.exists() for f in (folder_files(p) if p.is_dir() else [p])]
    return {str(f): [f.stat().st_size, f.stat().st_mtime_ns] for f in files}


def read(source: Any, split: str, max_row_bytes: int, columns: Columns = None, check: bool = False) -> Iterator[tuple[str, Raw]]:
    """Yield `(default source name, (origin, row))` over a source of any kind.

    Args:
        split: of a Hub dataset, or of a JSON object with several lists.
        max_row_bytes: a longer line comes as `Invalid` and is never held in memory.
        columns: the user's column map.
        check: refuse a table (parquet, csv, `Dataset`) without a conversation in its columns.

    Errors: `UsageError` for a source that is not there or no kind of data; `LlmselectError` for a damaged file.
    """
    if isinstance(source, str | Path):
        path = Path(source).expanduser()
        if path.exists() or means_file(str(source)):
            check_source(str(source), "pool")
            for file in folder_files(path) if path.is_dir() else [path]:
                name = file.relative_to(path).as_posix() if path.is_dir() else file.name
                for raw in _read_file(file, name, split, max_row_bytes, columns, check):
                    yield file.name.split(".")[0], raw
            return
        source, name = _hub(str(source), split), str(source).split("/")[-1]
    else:
        name = "dataset"
    if isinstance(source, Mapping) or not isinstance(source, Iterable):
        raise UsageError(f"pool: a source is a path, a Hub id, a Dataset or a list of rows, this is {type(source).__name__}"
                         + (f"; choose one of {sorted(map(str, source))[:8]}" if isinstance(source, Mapping) else ""))  # fmt: skip
    for i, row in enumerate(_table(source, name, columns, check) if hasattr(source, "column_names") else source):
        yield name, (f"{name}[{i}]", row)


def _hub(name: str, split: str) -> Any:
    from datasets import load_dataset

    try:
        return load_dataset(name, split=split)
    except Exception as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(f"pool: no file or folder {name}, and no dataset {name!r} (split {split!r}) from the Hub: {first}. "
                         "Give an existing path, or a Hub dataset such as org/name and its split") from error  # fmt: skip


def _table(data: Any, name: str, columns: Columns, check: bool) -> Iterator[dict[str, Any]]:
    """Rows of a `datasets.Dataset` or `IterableDataset` as plain Python."""
    if data.column_names is not None:
        if check:
            check_found(data.column_names, name, columns)
        if keep := wanted(data.column_names, columns):
            data = data.select_columns(keep)
    for batch in data.with_format(None).iter(batch_size=_ROWS):
        names = list(batch)
        yield from (dict(zip(names, values, strict=True)) for values in zip(*batch.values(), strict=True))


def _read_file(path: Path, name: str, split: str, max_row_bytes: int, columns: Columns, check: bool) -> Iterator[Raw]:
    kind, count = path.name.lower().removesuffix(".gz"), 0
    seen: Callable[[Iterable[str]], None] = lambda found: check_found(found, name, columns) if check else None  # noqa: E731
    if kind.endswith(".parquet"):
        rows = _parquet(path, name, columns, seen)
    elif kind.endswith(".json"):
        rows = _json(path, name, split, max_row_bytes)
    elif kind.endswith(".csv"):
        rows = _csv(path, name, max_row_bytes, seen)
    else:
        rows = _lines(path, name, max_row_bytes)
    try:
        for raw in rows:
            yield raw
            count += 1
    except (EOFError, zlib.error, OSError) as error:
        raise LlmselectError(
            f"{path}: the file is truncated or unreadable after {count} rows ({error}); fetch or make it again"
        ) from error


def _open(path: Path) -> Any:
    with path.open("rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
    return gzip.open(path, "rb") if zipped else path.open("rb")


def _lines(path: Path, name: str, max_row_bytes: int) -> Iterator[Raw]:
    with _open(path) as file:
        number = 0
        while line := file.readline(max_row_bytes + 1):
            number += 1
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            origin = f"{name}:{number}"
            if len(line) > max_row_bytes and not line.endswith(b"\n"):
                while (rest := file.readline(1 << 20)) and not rest.endswith(b"\n"):
                    pass  # a row of gigabytes must not be held to be refused
                yield origin, too_large(max_row_bytes, line)
            elif line.strip():
                yield origin, _parse(line)


def too_large(max_row_bytes: int, start: bytes) -> Invalid:
    """The finding for a row above the limit, with how it begins."""
    return Invalid("too_large", f"the row is longer than max_row_bytes = {max_row_bytes}", _excerpt(start))


def _excerpt(line: bytes) -> str:
    return line[:800].decode("utf-8", "backslashreplace")


def _parse(line: bytes) -> Any:
    """One JSON line as a row, or the `Invalid` that it is."""
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Invalid("invalid_utf8", f"byte {error.start} is not UTF-8", _excerpt(line))
    except (ValueError, RecursionError) as error:
        return Invalid("invalid_json", f"not JSON: {error}", _excerpt(line))


def _json(path: Path, name: str, split: str, max_row_bytes: int) -> Iterator[Raw]:
    """One JSON value, held in memory as a whole; a file of one object a line is read as such."""
    with _open(path) as file:
        data = file.read().removeprefix(b"\xef\xbb\xbf")
    try:
        parsed = json.loads(data.decode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError) as error:
        if data.lstrip()[:1] == b"[":
            raise LlmselectError(f"{path}: not JSON: {error}; mend it, or write one object a line into a .jsonl file") from error
        yield from _lines(path, name, max_row_bytes)
        return
    del data
    if isinstance(parsed, dict):
        parsed = _list_in(parsed, name, split)
    for i, row in enumerate(parsed if isinstance(parsed, list) else [parsed]):
        yield f"{name}[{i}]", _escaped(row) or row


def _list_in(parsed: dict[str, Any], name: str, split: str) -> list[Any]:
    """The rows of `{"version": 1, "data": [row, …]}`, or the one row that the object is."""
    lists = {key: v for key, v in parsed.items() if isinstance(v, list) and v and isinstance(v[0], dict)}
    if any(key in parsed for key in (*CONVERSATIONS, "instruction", "prompt", "text")):
        return [parsed]
    if split not in lists and len(lists) > 1:
        raise UsageError(f"{name}: several lists of rows: {sorted(lists)}; choose one with split=")
    return lists.get(split) or next(iter(lists.values()), [parsed])


def _escaped(row: Any) -> Invalid | None:
    """Whether bytes that are no UTF-8 came through `surrogateescape` into a row."""
    text = json.dumps(row, ensure_ascii=False)
    bad = next((c for c in text if "\udc80" <= c <= "\udcff"), None) if not text.isascii() else None
    return Invalid("invalid_utf8", f"byte {ord(bad) - 0xDC00:#x} is not UTF-8", text[:800]) if bad else None


def _csv(path: Path, name: str, max_row_bytes: int, seen: Callable[[Iterable[str]], None]) -> Iterator[Raw]:
    csv.field_size_limit(max(csv.field_size_limit(), max_row_bytes))
    with _open(path) as file:
        rows = csv.DictReader(io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline=""), strict=True)
        seen(rows.fieldnames or ())
        while True:
            origin = f"{name}:{rows.line_num + 1}"
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                yield origin, Invalid("invalid_csv", f"not CSV: {error}")
                continue
            if None in row:
                yield (
                    origin,
                    Invalid("invalid_csv", f"more fields than the header's {len(rows.fieldnames or ())}", str(row)[:800]),
                )
            else:
                yield origin, _escaped(row) or row


def _parquet(path: Path, name: str, columns: Columns, seen: Callable[[Iterable[str]], None]) -> Iterator[Raw]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    index = 0
    try:
        with pq.ParquetFile(path) as file:
            seen(file.schema_arrow.names)
            keep = wanted(file.schema_arrow.names, columns)
            for batch in file.iter_batches(batch_size=_ROWS, columns=keep or None):
                for row in _rows(batch):
                    yield f"{name}[{index}]", row
                    index += 1
    except pa.ArrowException as error:
        raise LlmselectError(f"{path}: not a readable parquet file after {index} rows: {error}") from error


def _rows(batch: Any) -> Iterator[Any]:
    """The rows of an Arrow batch; text that is no UTF-8 spoils its own row only."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for i in range(batch.num_rows):
            try:
                yield from batch.slice(i, 1).to_pylist()
            except UnicodeDecodeError as error:
                yield Invalid("invalid_utf8", f"byte {error.start} of a text is not UTF-8", _excerpt(error.object))
