"""The errors a user can meet, and the exit code each one means."""

from __future__ import annotations

import difflib
import errno
import importlib
from collections.abc import Iterable
from types import ModuleType


class LlmselectError(Exception):
    """A run that failed; the command line exits with 1. The message says what happened and what to do."""

    exit_code = 1


class UsageError(LlmselectError):
    """A wrong recipe, argument or file; the command line exits with 2, before any model loads."""

    exit_code = 2


class MissingExtra(UsageError):
    """An optional dependency is not installed; the message names the extra that brings it."""


def nearest(name: str, options: Iterable[str]) -> str:
    """`" Did you mean 'x'?"` for the closest of `options`, or an empty string when none is close."""
    if len(str(name)) > 100:
        return ""  # comparing takes the square of the length, and nobody means a name by it
    known = list(options)
    lower = {str(one).lower(): one for one in known}  # papers write their methods in capitals
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.6)
    close = close or [lower[one] for one in difflib.get_close_matches(str(name).lower(), lower, n=1, cutoff=0.6)]
    return f" Did you mean '{close[0]}'?" if close else ""


def require(module: str, extra: str) -> ModuleType:
    """Import `module`, or raise `MissingExtra` naming the extra that installs it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.split(".")[0]:
            raise  # the package is there but broken inside: hiding that would send the user to the wrong place
        raise MissingExtra(f"{module} is not installed; type: pip install 'llmselect[{extra}]'") from error


_FULL = ("StorageFull", "FileTooLarge", "QuotaExceeded", "No space left on device", "File too large", "Disk quota exceeded")


def of_the_disk(error: BaseException) -> OSError | None:
    """The refusal of a disk among what led to `error`: libraries that look for a file take any error to mean that it is not
    there."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
            return seen
        seen = seen.__cause__ or seen.__context__
    return None


def of_the_machine(error: BaseException) -> str | None:
    """What to tell of an error that is the machine's rather than ours: a disk that is full or refuses, memory at its end.

    None for any other error: those are defects, and their traceback is needed.
    """
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if isinstance(error, MemoryError) or "out of memory" in lines[0] or "can't allocate memory" in lines[0]:
        return f"out of memory ({lines[0]}); what is finished is kept: give the run more memory and type the same command"
    # safetensors and pyarrow tell of a full disk in classes of their own
    if isinstance(error, OSError) or any(sign in str(error) for sign in _FULL):
        return f"{lines[0]}; what is finished is kept: when the cause is gone, type the same command to continue"
    return None
