"""The errors a user can meet, and the exit code each one means."""

from __future__ import annotations

import difflib
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
    close = difflib.get_close_matches(str(name), list(options), n=1, cutoff=0.6)
    return f" Did you mean '{close[0]}'?" if close else ""


def require(module: str, extra: str) -> ModuleType:
    """Import `module`, or raise `MissingExtra` naming the extra that installs it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.split(".")[0]:
            raise  # the package is there but broken inside: hiding that would send the user to the wrong place
        raise MissingExtra(f"{module} is not installed; type: pip install 'llmselect[{extra}]'") from error
