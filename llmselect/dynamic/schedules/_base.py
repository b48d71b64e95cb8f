"""The base of every schedule: hyper-parameters as fields, one method that gives the rows of an epoch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np

from llmselect.errors import UsageError
from llmselect.kernels.keyed import Keyed, keys_of


class Epoch(NamedTuple):
    """`indices [k]` int64 in the order of training, `weights [k]` float64 of their losses."""

    indices: np.ndarray
    weights: np.ndarray


@dataclass(frozen=True)
class EpochSchedule:
    """Which rows every epoch trains on. The same (seed, epoch, row ids, losses) give the same rows, whatever the order
    of the pool and whatever the number of processes."""

    name: ClassVar[str]
    needs_losses: ClassVar[bool] = False  # whether an epoch depends on the losses of those before it

    def rows(self, epoch: int, epochs: int, n: int, rng: Keyed, losses: np.ndarray | None = None) -> Epoch:
        """The rows of epoch `epoch` of `epochs` (from 0).

        Args:
            n: rows of the pool.
            rng: keyed by row id; a schedule puts the epoch into the names of its streams.
            losses: `[n]`, each row's mean response loss when it was last trained on; NaN for a row never seen.
        """
        raise NotImplementedError

    def size(self, epoch: int, epochs: int, n: int) -> int:
        """Rows of the epoch: exactly, or at most where the schedule needs losses. Plans steps and learning rate."""
        raise NotImplementedError

    def materialise(self, epochs: int, *, n: int | None = None, ids: Any = None, seed: int = 0) -> list[Epoch]:
        """The rows of all epochs, for a training of your own.

        Errors: `UsageError` when they depend on losses that only training knows, or when neither `n` nor `ids` is given.
        """
        if self.needs_losses:
            raise UsageError(f"'{self.name}' follows the losses of a training; use llmselect.dynamic.attach(trainer, schedule)")
        if n is None and ids is None:
            raise UsageError("materialise: give n=, the rows of the pool, or ids=")
        n = len(ids) if n is None else n
        rng = Keyed(seed, keys_of(ids, n))
        return [self.rows(epoch, epochs, n, rng) for epoch in range(epochs)]


def permutation(rng: Keyed, stream: str, rows: np.ndarray | None = None) -> np.ndarray:
    """All rows, or `rows`, in random order; the sequence of row ids does not depend on the order of the pool."""
    rows = np.arange(len(rng.keys)) if rows is None else rows
    return rows[np.lexsort((rng.keys[rows], rng.uniform(stream)[rows]))]


def annealing(epoch: int, epochs: int, share: float) -> bool:
    """Whether `epoch` (from 0) is one of the last ⌈share · epochs⌉: epoch + 1 > (1 − share) · epochs."""
    return epoch + 1 > (1 - share) * epochs + 1e-9


def check_share(name: str, value: float, *, above: float | None = None, below: float | None = None) -> None:
    """Refuse a field outside [0, 1], or at the ends given as open.

    Errors: `UsageError` naming field and range.
    """
    if not 0 <= value <= 1 or value in (above, below):
        left, right = "(" if above is not None else "[", ")" if below is not None else "]"
        raise UsageError(f"{name}: {value} is not in {left}0, 1{right}")
