"""Files, folders, Hub datasets and lists → raw rows with their origin; a bad line is a finding, not the end."""

from __future__ import annotations

# datasets and pyarrow have no types.
# pyright: reportMissingTypeStubs=false
import codecs
import csv
import gzip
import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llmselect import atomic
from llmselect.errors import LlmselectError, UsageError
from llmselect.formats import Invalid
from llmselect.plain import is_list, is_mapping

SUFFIXES = (".jsonl", ".jsonl.gz", ".ndjson", ".json", ".json.gz", ".parquet", ".csv", ".csv.gz")
MOST_JSON = 1 << 30  # bytes of a .json file once unpacked: it is parsed as a whole, a few KB of gzip can be gigabytes
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


def contents(places: list[str], known: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    """Size, time and SHA-256 of every local file among `places`: a copy with another time is the same file.

    A file whose size and time are those of `known`, an earlier answer, is not read again.
    """
    found: dict[str, list[Any]] = {}
    for file, stamp in stamps(places).items():
        same = file in known and list(known[file][:2]) == stamp
        found[file] = [*stamp, known[file][2] if same else atomic.sha256_file(file)]
    return found


def read(source: Any, split: str, max_row_bytes: int, subset: str | None = None) -> Iterator[tuple[str, Raw]]:
    """Yield `(default source name, (origin, row))` over a source of any kind; `split` and `subset` are of a Hub dataset."""
    if isinstance(source, str | Path):
        path = Path(source).expanduser()
        if path.exists() or means_file(str(source)):
            check_source(str(source), "pool")
            for file in folder_files(path) if path.is_dir() else [path]:
                stem = _name(file).split(".")[0]
                for raw in read_file(file, max_row_bytes):
                    yield stem, raw
            return
        source, name = _hub(str(source), split, subset), str(source).split("/")[-1]
    else:
        name = "dataset"
    for i, row in enumerate(source):
        yield name, (f"{name}[{i}]", row)


def _hub(name: str, split: str, subset: str | None) -> Any:
    import datasets

    untyped: Any = datasets
    try:
        return untyped.load_dataset(name, subset, split=split)
    except Exception as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        which = f"split {split!r}" + (f" of subset {subset!r}" if subset else "; some need a subset, e.g. pool.subset=main")
        raise UsageError(f"pool: cannot load dataset {name!r} ({which}) from the Hub: {first}") from error


def read_file(path: Path, max_row_bytes: int) -> Iterator[Raw]:
    """Rows of one file in order; lines that do not parse come as `Invalid` with their line number.

    Errors: `LlmselectError` naming a file that is truncated, not in the encoding or format that its name says, or too large.
    """
    name = path.name.lower().removesuffix(".gz")
    try:
        if name.endswith(".parquet"):
            yield from _parquet(path)
        elif name.endswith(".json"):
            yield from _json(path, max_row_bytes)
        elif name.endswith(".csv"):
            yield from _csv(path, max_row_bytes)
        else:
            yield from _lines(path, max_row_bytes)
    except (EOFError, gzip.BadGzipFile, zlib.error, OSError) as error:
        raise LlmselectError(f"{path}: the file is truncated or unreadable ({error}); fetch or make it again") from error


def _open(path: Path) -> Any:
    """The bytes of a file, unpacked, after a byte order mark."""
    with path.open("rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
    opened: Any = (gzip.open if zipped else Path.open)(path, "rb")  # closed by who reads it
    first = opened.read(4)
    if first[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) or first == codecs.BOM_UTF32_BE:
        opened.close()
        raise UsageError(f"{path}: the file is UTF-16 or UTF-32; convert it: iconv -f utf-16 -t utf-8")
    opened.seek(len(codecs.BOM_UTF8) if first.startswith(codecs.BOM_UTF8) else 0)
    return opened


def _name(path: Path) -> str:
    return path.name.encode("utf-8", "backslashreplace").decode()  # names of files may be any bytes


def _lines(path: Path, max_row_bytes: int) -> Iterator[Raw]:
    with _open(path) as file:
        number = 0
        while line := file.readline(max_row_bytes + 1):
            number += 1
            origin = f"{_name(path)}:{number}"
            if len(line) > max_row_bytes and not line.endswith(b"\n"):
                _skip_line(file)
                yield origin, Invalid("too_large", f"the row is longer than {max_row_bytes} bytes (max_row_bytes)")
            elif line.strip():
                yield origin, parse(line)


def _skip_line(file: Any) -> None:
    while (rest := file.readline(1 << 20)) and not rest.endswith(b"\n"):
        pass  # a row of gigabytes must not be held to be refused


def parse(line: bytes) -> Any:
    """One JSON line as a row, or the `Invalid` that it is."""
    try:
        return json.loads(line.decode("utf-8"), object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        return Invalid("invalid_utf8", f"byte {error.start} is not UTF-8")
    except Invalid as found:
        return found
    except (ValueError, RecursionError) as error:
        return Invalid("invalid_json", f"not JSON: {error}")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):  # which of two answers is the right one is not ours to guess
        twice = next(name for i, (name, _) in enumerate(pairs) if name in dict(pairs[:i]))
        raise Invalid("duplicate_key", f"the field {twice!r} stands twice in one object")
    return found


def _json(path: Path, max_row_bytes: int) -> Iterator[Raw]:
    too_large = LlmselectError(f"{path}: a .json file is read as a whole and this one does not fit; make it .jsonl, a row a line")
    try:
        with _open(path) as file:
            data = file.read(MOST_JSON + 1)
        if len(data) > MOST_JSON:
            raise too_large
        parsed = parse(data)
    except MemoryError:
        raise too_large from None
    if isinstance(parsed, Invalid):  # many ".json" files hold one object a line
        yield from _lines(path, max(max_row_bytes, len(data)))
        return
    if is_mapping(parsed):
        lists = [value for value in parsed.values() if is_list(value) and value and is_mapping(value[0])]
        single = any(k in parsed for k in ("messages", "conversations", "instruction", "prompt", "text"))
        parsed = lists[0] if len(lists) == 1 and not single else [parsed]
    for i, row in enumerate(parsed if is_list(parsed) else [parsed]):
        yield f"{_name(path)}[{i}]", row


def _csv(path: Path, max_row_bytes: int) -> Iterator[Raw]:
    """Rows of a CSV file whose first row names the columns. A quote that is never closed costs one row, of bounded size."""
    before = csv.field_size_limit(max_row_bytes)
    try:
        with _open(path) as file:
            rows = csv.reader(_bounded(file, max_row_bytes), strict=True)
            names = next(rows, list[str]())
            if len(set(names)) != len(names):
                raise UsageError(f"{path}: a column stands twice in the first line: {', '.join(names)[:200]}")
            while True:
                try:
                    row = next(rows, None)
                except csv.Error as error:
                    yield f"{_name(path)}:{rows.line_num}", Invalid("invalid_csv", f"not CSV: {error}")
                    continue
                if row is None:
                    return
                if row:
                    yield f"{_name(path)}:{rows.line_num}", _named(names, row)
    except csv.Error as error:
        raise UsageError(f"{path}: the line of column names is not CSV: {error}") from error
    finally:
        csv.field_size_limit(before)


def _bounded(file: Any, most: int) -> Iterator[str]:
    """Lines of text; of one that is too long enough is given for the reader of fields to refuse it."""
    while line := file.readline(most + 2):
        if len(line) > most and not line.endswith(b"\n"):
            _skip_line(file)
        yield line.decode("utf-8", "surrogateescape")


def _named(names: list[str], row: list[str]) -> Any:
    if len(row) > len(names):  # a comma outside quotes: the text would be cut at it without a word
        return Invalid("extra_fields", f"{len(row)} fields in a row of {len(names)} columns; is a comma outside quotes?")
    return dict(zip(names, row, strict=False))


def _parquet(path: Path) -> Iterator[Raw]:
    import pyarrow
    import pyarrow.parquet

    pa: Any = pyarrow
    pq: Any = pyarrow.parquet
    index = 0
    try:
        file = pq.ParquetFile(path)
        names = file.schema_arrow.names
        if len(set(names)) != len(names):
            raise UsageError(f"{path}: a column stands twice: {', '.join(names)[:200]}")
        for batch in file.iter_batches(batch_size=100):
            for row in batch.to_pylist():
                yield f"{_name(path)}[{index}]", row
                index += 1
    except (pa.ArrowException, UnicodeDecodeError) as error:
        told = (str(error).splitlines() or [type(error).__name__])[0]
        raise LlmselectError(f"{path}: not a readable parquet file, after {index} rows: {told}; make it again") from error
