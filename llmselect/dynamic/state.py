"""Where a training stands in its schedule: the epoch, its rows, and the last loss of every row."""

from __future__ import annotations

import base64
import hashlib
import json
from typing import Any

import numpy as np

from llmselect import config
from llmselect.dynamic.schedules._base import Epoch, EpochSchedule
from llmselect.errors import LlmselectError, UsageError
from llmselect.kernels.keyed import Keyed, keys_of


class EpochState:
    """A schedule on its way through `epochs` epochs of a pool of `n` rows.

    Attributes: `epoch`, the current one (None before the first); `indices [k]` and `weights [k]` of its rows;
    `losses [n]` float32, each row's mean response loss when it was last trained on, NaN for a row never seen.

    Args:
        ids: of the rows; without them draws are keyed by row number and `n` must be given.
        losses: `[n]` to begin with, for example from the `loss` extractor.

    Errors: `UsageError` when numbers of rows disagree or there are no epochs.
    """

    schedule: EpochSchedule
    epochs: int
    n: int
    seed: int
    epoch: int | None
    indices: np.ndarray
    weights: np.ndarray
    losses: np.ndarray
    before: np.ndarray  # losses when the epoch began

    def __init__(self, schedule: EpochSchedule, *, epochs: int, n: int | None = None, ids: Any = None, seed: int = 0,
                 losses: Any = None):  # fmt: skip
        if n is None and ids is None:
            raise UsageError("give n=, the rows of the pool, or ids=")
        self.n = len(ids) if n is None else n
        given = {"n": self.n, **{k: len(v) for k, v in (("ids", ids), ("losses", losses)) if v is not None}}
        if len(set(given.values())) > 1:
            raise UsageError(f"the numbers of rows disagree: {given}; give the ids and losses of the rows that are trained on")
        if epochs < 1:
            raise UsageError(f"epochs: {epochs} must be at least 1")
        self.schedule, self.epochs, self.seed = schedule, epochs, seed
        self._rng = Keyed(seed, keys_of(ids, self.n))
        self._first = np.full(self.n, np.nan, np.float32) if losses is None else np.array(losses, np.float32)
        self.reset()

    def reset(self) -> None:
        """Back to before the first epoch."""
        self.epoch = None
        self.losses, self.before = self._first.copy(), self._first.copy()
        self.indices, self.weights = np.zeros(0, np.int64), np.zeros(0)

    def begin(self, epoch: int) -> None:
        """Draw the rows of `epoch` from the losses known now; nothing happens when it is the current one."""
        if epoch != self.epoch:
            self.before = self.losses.copy()
            self._draw(epoch)

    def _draw(self, epoch: int) -> None:
        drawn: Epoch = self.schedule.rows(epoch, self.epochs, self.n, self._rng, self.before)
        if not len(drawn.indices):
            raise LlmselectError(f"'{self.schedule.name}' leaves no row for epoch {epoch + 1}; give it more rows to keep")
        self.epoch, (self.indices, self.weights) = epoch, drawn

    def record(self, rows: Any, losses: Any) -> None:
        """Note the losses of rows that were trained on; a NaN says nothing and changes nothing."""
        rows, losses = np.asarray(rows, np.int64), np.asarray(losses, np.float32)
        said = ~np.isnan(losses)
        self.losses[rows[said]] = losses[said]

    def key(self) -> dict[str, Any]:
        """What must be the same for a saved state to go on."""
        settings = config.to_dict(self.schedule)
        if len(json.dumps(settings)) > 1000:
            settings = config.fingerprint(settings)
        ids = hashlib.blake2b(self._rng.keys.tobytes(), digest_size=8).hexdigest()
        epochs = {"epochs": self.epochs} if self.schedule.needs_losses else {}
        return {"schedule": self.schedule.name, "settings": settings, "seed": self.seed, "n": self.n, "ids": ids, **epochs}

    def saved(self) -> dict[str, Any]:
        """As plain JSON: 5.4 bytes per row and array."""
        arrays = {name: _text(getattr(self, name)) for name in ("losses", "before")}
        return {"key": self.key(), "epoch": self.epoch, **arrays}

    def restore(self, saved: dict[str, Any]) -> None:
        """Go on from `saved`. Errors: `LlmselectError` showing the difference when it is of another schedule or pool."""
        if lines := config.difference(saved["key"], json.loads(json.dumps(self.key()))):
            raise LlmselectError("the checkpoint was made with another schedule or other rows:\n  " + "\n  ".join(lines)
                                 + "\nResume with the old ones, or start a new output_dir.")  # fmt: skip
        self.losses, self.before = _array(saved["losses"]), _array(saved["before"])
        self.epoch = None
        if saved["epoch"] is not None:
            self._draw(saved["epoch"])


def _text(array: np.ndarray) -> str:
    return base64.b64encode(array.astype("<f4").tobytes()).decode()


def _array(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), "<f4").astype(np.float32)
