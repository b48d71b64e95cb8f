"""Held-out response loss per task, with bootstrap intervals and paired differences."""

from __future__ import annotations

# datasets has no types.
# pyright: reportMissingTypeStubs=false
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmselect import atomic
from llmselect.errors import LlmselectError

if TYPE_CHECKING:
    from datasets import Dataset

RESAMPLES = 2000


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % percentile-bootstrap interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def bootstrap(tasks: Sequence[np.ndarray], *, seed: int = 0, resamples: int = RESAMPLES) -> Interval:
    """Interval of the mean over tasks of each task's mean over rows; rows are resampled within their task.

    Args:
        tasks: one array of row values per task; an array may be `[rows]` or `[seeds, rows]` (seeds are averaged: the
            interval is over rows, the spread over seeds is told apart).
    """
    rng = np.random.default_rng(seed)
    rows = [np.asarray(t, np.float64) for t in tasks]
    rows = [t.mean(0) if t.ndim == 2 else t for t in rows]
    if not rows or any(len(t) == 0 for t in rows):
        raise LlmselectError("no held-out rows to take an interval over")
    draws = [t[rng.integers(0, len(t), (resamples, len(t)))].mean(1) for t in rows]
    low, high = np.quantile(np.mean(draws, axis=0), [0.025, 0.975])
    return Interval(float(np.mean([t.mean() for t in rows])), float(low), float(high))


def row_losses(model: str, adapter: str | None, tests: Mapping[str, Dataset], *, dtype: Any = "auto",
               max_length: int | None = None, batch_tokens: int | None = None,
               tokens: Path | None = None) -> dict[str, np.ndarray]:  # fmt: skip
    """Response NLL of every held-out row, task → `[rows]`, mean over the row's supervised tokens in nats. `tokens` is a
    folder where the rows' tokens are kept.

    Errors: `LlmselectError` naming a row whose loss is not finite.
    """
    from llmselect.engine.backbone import Backbone
    from llmselect.engine.passes import Pass, default_batch_tokens
    from llmselect.extractors.loss import Loss

    loss = Loss(model=model, adapter=adapter, dtype=dtype, max_length=max_length, without_prompt=False)
    backbone = Backbone(model, adapter, dtype, max_length, tokens=tokens)
    run = Pass(backbone, {"loss": loss}, {}, {}, batch_tokens=batch_tokens or default_batch_tokens())
    found: dict[str, np.ndarray] = {}
    for task, data in tests.items():
        spans = [(range(start, start + 1024), ["loss"]) for start in range(0, len(data), 1024)]
        nll = np.concatenate([arrays["loss"]["nll"] for _, arrays in run.parts(data, spans)])
        if len(bad := np.flatnonzero(~np.isfinite(nll))):
            raise LlmselectError(f"{task}: held-out row {data[int(bad[0])]['id']} has loss {nll[bad[0]]} (of {len(bad)} such)")
        found[task] = nll
    return found


def evaluate(out: Path, key: Mapping[str, Any], model: str, adapter: str | None, tests: Mapping[str, Dataset],
             **options: Any) -> dict[str, np.ndarray]:  # fmt: skip
    """`row_losses`, kept in the JSON file `out`; an existing file of the same `key` is read instead.

    Errors: `LlmselectError` when the file was made from something else.
    """
    plain = json.loads(json.dumps(key))
    if out.exists():
        stored = atomic.read_sealed(out, f"delete {out} and run again")
        if stored["key"] != plain:
            from llmselect.config import difference

            lines = "\n  ".join(difference(stored["key"], plain))
            raise LlmselectError(f"{out} measures something else:\n  {lines}\nDelete it, or give the run another out=.")
        return {task: np.asarray(values) for task, values in stored["nll"].items()}
    found = row_losses(model, adapter, tests, **options)
    nll = {task: [round(float(v), 6) for v in values] for task, values in found.items()}
    atomic.write_sealed(out, {"key": plain, "nll": nll})
    return {task: np.asarray(values) for task, values in nll.items()}
