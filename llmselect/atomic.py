"""Files that are complete or absent: written beside their place, synced to disk, then renamed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmselect.errors import LlmselectError


def _sync_folder(folder: Path) -> None:
    # A rename survives a power cut only once the directory entry itself is on disk.
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_bytes(path: Path | str, data: bytes) -> None:
    """Write `data` to `path` so that a reader sees the old file, the new one, or none: never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, beside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        Path(beside).unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def write_text(path: Path | str, text: str) -> None:
    """`write_bytes` of UTF-8 text."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path | str, value: Any) -> None:
    """`write_bytes` of canonical JSON (sorted keys, no NaN), the same bytes for the same value."""
    write_text(path, json_text(value))


def json_text(value: Any) -> str:
    """What `write_json` writes."""
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def checksum(about: Mapping[str, Any]) -> str:
    """SHA-256 (hex) of the plain values of a manifest, its own checksum left out."""
    rest = {k: v for k, v in about.items() if k != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def write_sealed(path: Path | str, about: Mapping[str, Any]) -> None:
    """`write_json` of a manifest with its own checksum, so that `read_sealed` notices a changed byte."""
    write_json(path, {**about, "checksum": checksum(about)})


def read_sealed(path: Path | str, again: str) -> dict[str, Any]:
    """The manifest that `write_sealed` wrote, without its checksum. One written before there were checksums is believed.

    Errors: `LlmselectError` naming the file and saying `again`, what to type, when it is missing, cut or changed.
    """
    about = read_json(path, again, sealed=True)
    seals = [name for name, value in about.items() if value == checksum({k: v for k, v in about.items() if k != name})]
    if seals != ["checksum"] and (seals or "checksum" in about):
        raise _damaged(path, again)
    return {k: v for k, v in about.items() if k != "checksum"}


def read_json(path: Path | str, again: str, sealed: bool = False) -> dict[str, Any]:
    """The mapping in a file that `write_json` wrote; with `sealed`, the text too must be as written.

    Errors: `LlmselectError` naming the file and saying `again`, what to type.
    """
    try:
        text = Path(path).read_bytes()
        about: dict[str, Any] = json.loads(text)
        # The text too: the last digit of a number may change without the number.
        intact = type(about) is dict and (not sealed or text == json_text(about).encode())
    except FileNotFoundError:
        raise LlmselectError(f"{path} is missing; {again}") from None
    except (ValueError, RecursionError):
        about, intact = {}, False
    if not intact:
        raise _damaged(path, again)
    return about


def _damaged(path: Path | str, again: str) -> LlmselectError:
    return LlmselectError(f"{path} is damaged (its bytes are not those written); {again}")


def move(beside: Path | str, path: Path | str) -> None:
    """Give a finished, synced file its place."""
    os.replace(beside, path)
    _sync_folder(Path(path).parent)


@contextmanager
def beside(path: Path | str) -> Generator[Path]:
    """Yield a new file beside `path` for what writes by itself; on success it takes that place, on error it goes."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    os.close(handle)
    try:
        yield Path(name)
        with Path(name).open("rb") as file:
            os.fsync(file.fileno())
        move(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def sha256_file(path: Path | str) -> str:
    """Hex SHA-256 of a file's bytes, read in blocks."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def replace_dir(path: Path | str) -> Generator[Path]:
    """Yield an empty folder beside `path`; on success it takes the place of `path`, on error it is removed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part"))
    try:
        yield beside
        for file in beside.rglob("*"):
            if file.is_file():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
        if path.exists():
            # Out of the way in one step: a kill while files are deleted one by one would leave half a folder.
            old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part"))
            os.replace(path, old)
            os.replace(beside, path)
            shutil.rmtree(old)
        else:
            os.replace(beside, path)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    _sync_folder(path.parent)
