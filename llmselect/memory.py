"""Memory: the rows that an earlier run selected, which join the pool of this one.

Paper: lifelong instruction tuning in Adapt-∞, Maharana et al., arXiv 2410.10636, section 3.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmselect import account, config
from llmselect.errors import UsageError
from llmselect.selection import Selection

if TYPE_CHECKING:
    from llmselect.stages import Run

REMEMBERED = "memory"  # evidence: whether a selected row is of the memory


def check_memory(place: str) -> None:
    """Errors: `UsageError` for a folder that is no selection of a run."""
    folder = Path(place).expanduser()
    if not ((folder / "selection.json").exists() and (_run(folder) / account.NAME).exists()):
        raise UsageError(f"pool.memory: {place} is no selection of a run; give RUN/selections/METHOD/seed-S")


def remembered(place: str) -> Iterator[dict[str, Any]]:
    """The rows of a selection in the folder of its run, best first, each with the licence that it or its dataset states.

    Errors: `UsageError` for a folder that is none; `LlmselectError` when its files are damaged or of another pool.
    """
    from llmselect.hub.origin import NOT_STATED
    from llmselect.pool import open_rows

    check_memory(place)
    folder = Path(place).expanduser()
    data: Any = open_rows(account.intact(_run(folder), "pool/pool.arrow"))
    usable = np.load(account.intact(_run(folder), "pool/usable.npy"), allow_pickle=False)
    stated: dict[str, Any] = account.read(_run(folder)).get("dataset") or {}
    licence = stated.get("licence") or NOT_STATED  # not that of the new pool
    rows: Any = Selection.load(folder).to_dataset(data.select(usable))
    for row in rows:
        yield {**row, "license": row.get("license") or licence}


def seed_of(run: Run, seed: int) -> int:
    """`seed`, or in a run with a memory another that follows from it and the old rows: draws go by seed and row id, and rows that
    were picked by theirs would be picked by them again, before all new ones."""
    if run.recipe.pool.memory is None:
        return seed
    old: list[str] = [*run.opened("pool")[: account.read(run.folder)["pool"]["remembered"]]["id"]]
    return int(config.fingerprint({"seed": seed, "memory": old})[:8], 16)


def of_memory(run: Run) -> np.ndarray | None:
    """`[n]`, whether a row of the pool came from the memory; None for a run without one."""
    if run.recipe.pool.memory is None:
        return None
    usable = np.load(account.intact(run.folder, "pool/usable.npy"), allow_pickle=False)
    return usable < account.read(run.folder)["pool"]["remembered"]  # they are read before the others


def _run(selection: Path) -> Path:
    return selection.absolute().parent.parent.parent
