"""Claims: files that say who works on what, so that processes sharing a folder never do the same work twice."""

from __future__ import annotations

import json
import os
import socket
import tempfile
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def claim(path: Path) -> Generator[bool]:
    """Whether this process now holds `path`; if so it is given back at the end of the block.

    A claim of a process of this host that no longer lives is broken. One of another host is believed: delete the file
    by hand if that machine is gone.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    held = _take(path) or (_break_stale(path) and _take(path))
    try:
        yield held
    finally:
        if held:
            path.unlink(missing_ok=True)


def holder(path: Path) -> dict[str, int | str] | None:
    """Who holds a claim, `{host, pid, started}`; None when nobody does."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None


def _take(path: Path) -> bool:
    # A link of a finished file appears at once and with its content, or fails: no claim is ever seen half written.
    handle, beside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    with os.fdopen(handle, "w") as file:
        json.dump({"host": socket.gethostname(), "pid": os.getpid(), "started": _started(os.getpid())}, file)
    try:
        os.link(beside, path)
        return True
    except FileExistsError:
        return False
    finally:
        Path(beside).unlink()


def _break_stale(path: Path) -> bool:
    """Remove the claim of a dead process of this host."""
    import fcntl

    # Two processes that find the same stale claim: the second must not remove the new claim of the first.
    with (path.parent / "breaking").open("w") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        about = holder(path)
        if about is None:
            return True
        if about["host"] != socket.gethostname() or _lives(int(about["pid"]), str(about["started"])):
            return False
        path.unlink(missing_ok=True)
        return True


def _lives(pid: int, started: str) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return _started(pid) == started


def _started(pid: int) -> str:
    """When a process began, so that its number given to another one is noticed; empty where the system does not tell."""
    with suppress(OSError, IndexError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if fields[0] == "Z" else fields[19]
    return ""
