"""The account of a run's rows, `rows.json`: what became of every row read, and the digests of the files that hold the rest."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from llmselect import atomic
from llmselect.errors import LlmselectError

NAME = "rows.json"
STAGES, SELECTIONS = "timings.json", "selections/seconds.json"  # seconds of the stages, and of each selection


def write(folder: Path, account: Mapping[str, Any], files: list[str]) -> None:
    """Write the account of the run in `folder`, with the digests of `files`: it stands for them being complete."""
    digests = {name: atomic.sha256_file(folder / name) for name in files}
    atomic.write_sealed(folder / NAME, {**account, "sha256": digests})


def read(folder: Path) -> dict[str, Any]:
    """The account of the run in `folder`. Errors: `LlmselectError` when it is missing or damaged."""
    return atomic.read_sealed(folder / NAME, _again(folder))


def intact(folder: Path, name: str) -> Path:
    """The file `name` of a run, once its bytes are those that the account tells.

    Errors: `LlmselectError` naming a file that is missing or damaged, and what to type.
    """
    file = folder / name
    known = read(folder).get("sha256", {}).get(name) if (folder / NAME).exists() else None  # None: being made
    if not file.exists() or (known and _digest(str(file), file.stat().st_size, file.stat().st_mtime_ns) != known):
        raise LlmselectError(f"{file} is missing or damaged; {_again(folder)}")
    return file


def seconds(folder: Path, of: str) -> dict[str, float]:
    """What `STAGES` or `SELECTIONS` of the run in `folder` tells; nothing where there is none. Errors: `LlmselectError` when it
    is damaged."""
    file = folder / of
    return atomic.read_sealed(file, f"delete {file} and run again") if file.exists() else {}


def took(folder: Path, of: str, name: str, value: float) -> None:
    """Note the seconds of one."""
    atomic.write_sealed(folder / of, {**seconds(folder, of), name: round(value, 3)})


def _again(folder: Path) -> str:
    return f"delete {folder / NAME} and run again: the rows are read anew"


@lru_cache(maxsize=64)
def _digest(path: str, size: int, changed: int) -> str:
    return atomic.sha256_file(path)
