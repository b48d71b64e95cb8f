"""The file of a cell: losses per held-out row and costs, small enough to be kept beside the code."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmselect import atomic
from llmselect.errors import LlmselectError

INLINE = 4000  # losses in the JSON itself; more of them go into one .npy beside it
FACTS = ("grid", "model", "target", "method", "budget", "seed", "rows", "tokens", "seconds", "forwards", "tests")


@dataclass(frozen=True)
class Result:
    """A measured cell. `losses`: task → `[rows]` in nats per token; `seconds` of `features` (the whole pool), `select`,
    `train`, `evaluate`; `forwards`: what selecting costs in forward passes over the pool; `tests`: which held-out rows."""

    grid: str
    model: str
    target: str
    method: str
    budget: str
    seed: int
    rows: int
    tokens: int
    seconds: dict[str, float]
    forwards: float
    tests: dict[str, str]
    losses: dict[str, np.ndarray]
    key: Mapping[str, Any]

    @property
    def nll(self) -> float:
        """Mean over tasks of the mean over rows."""
        return float(np.mean([values.mean() for values in self.losses.values()]))

    def save(self, path: Path) -> None:
        """Write the file, complete or absent, on one line: losses rounded to 1e-4."""
        losses = {task: np.round(np.asarray(v, np.float64), 4) for task, v in self.losses.items()}
        about = {**{name: getattr(self, name) for name in FACTS}, "key": dict(self.key)}
        about["mean"] = {task: round(float(values.mean()), 6) for task, values in losses.items()}
        if sum(map(len, losses.values())) <= INLINE:
            about["losses"] = {task: values.tolist() for task, values in losses.items()}
        else:
            buffer = io.BytesIO()
            np.save(buffer, np.concatenate([losses[task] for task in sorted(losses)]).astype(np.float32), allow_pickle=False)
            atomic.write_bytes(path.with_suffix(".npy"), buffer.getvalue())
            about["losses"] = {task: len(values) for task, values in losses.items()}
            about["sha256"] = hashlib.sha256(buffer.getvalue()).hexdigest()
        about["checksum"] = atomic.checksum(about)
        atomic.write_text(path, _text(about))


def _text(about: Mapping[str, Any]) -> str:
    return json.dumps(about, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def load(path: Path) -> Result:
    """Read a cell's file. Errors: `LlmselectError` naming one that is damaged."""
    try:
        text = path.read_text("utf-8")
        about = json.loads(text)
        if about.get("checksum") != atomic.checksum(about) or text != _text(about):
            raise ValueError("it was changed: its checksum differs")
        losses = about["losses"]
        if "sha256" in about:
            beside = path.with_suffix(".npy")
            if not beside.exists() or atomic.sha256_file(beside) != about["sha256"]:
                raise LlmselectError(f"{beside} is missing or damaged; delete {path} and run the grid again")
            # Keys are sorted in the file, so the order of the tasks is that of their names on both sides.
            flat, ends = np.load(beside, allow_pickle=False), np.cumsum([losses[task] for task in sorted(losses)])
            parts = np.split(flat.astype(np.float64), ends[:-1])
            losses = dict(zip(sorted(losses), parts, strict=True))
        found = {task: np.asarray(values, np.float64) for task, values in losses.items()}
        return Result(**{name: about[name] for name in FACTS}, losses=found, key=about["key"])
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise LlmselectError(f"{path} is no result of a benchmark ({error}); delete it and run the grid again") from error


def load_all(folder: Path) -> list[Result]:
    """All results below `folder`, in the order of their files.

    Errors: `LlmselectError` when two that are compared were measured on other held-out rows.
    """
    found = list[Result]()
    tests = dict[tuple[str, str, str], tuple[Path, dict[str, str]]]()
    for path in sorted(Path(folder).rglob("*.json")):
        made = load(path)
        where = (made.grid, made.model, made.target)
        first, known = tests.setdefault(where, (path, made.tests))
        if known != made.tests:
            raise LlmselectError(f"{path} was measured on other rows than {first}; delete the older one and run the grid again")
        found.append(made)
    return found
