"""Optimizer steps of equal supervised tokens: methods are compared at the same tokens and the same number of updates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from llmselect.chat import Encoded
from llmselect.errors import LlmselectError

Segment = tuple[int, int, int]  # row, and the range [start, stop) of its supervised tokens that count in this step


@dataclass(frozen=True)
class Schedule:
    """Rows (each encoded once) and, per step, the segments that train in it; `epochs` passes over the selection."""

    rows: list[Encoded]
    numbers: list[int]
    steps: list[list[Segment]]
    tokens: int
    epochs: float


def schedule(count: int, encode: Callable[[Sequence[int]], list[Encoded]], tokens: int | None, batch_tokens: int,
             seed: int, block: int = 256, epochs: int = 1,
             order: Callable[[int], Sequence[int]] | None = None) -> Schedule:  # fmt: skip
    """Lay `count` rows out in seeded epochs and cut them into steps of exactly `batch_tokens` supervised tokens.

    A row that straddles the border of two steps is in both, with its labels shared out between them. The last step
    ends exactly at `tokens` (after `epochs` when None). Rows are encoded only until the budget is full. `order(e)` gives the
    rows of epoch e in their order; None: all of them, shuffled.

    Errors: `LlmselectError` when rows have no supervised token.
    """
    rows: list[Encoded] = []
    place: dict[int, int] = {}
    steps: list[list[Segment]] = [[]]
    seen, room, epoch = 0, batch_tokens, 0
    used = 0
    while True:
        shuffled = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation
        rows_now = shuffled(count) if order is None else order(epoch)
        for start in range(0, len(rows_now), block):
            part = [int(i) for i in rows_now[start : start + block]]
            new = [i for i in dict.fromkeys(part) if i not in place]
            for i, row in zip(new, encode(new), strict=True):
                place[i] = len(rows)
                rows.append(row)
            for i in part:
                size, at = int(rows[place[i]].response.sum()), 0
                if tokens is not None:
                    size = min(size, tokens - seen)
                used += 1
                while at < size:
                    if not room:
                        steps.append([])
                        room = batch_tokens
                    take = min(room, size - at)
                    steps[-1].append((place[i], at, at + take))
                    at, room, seen = at + take, room - take, seen + take
                if tokens is not None and seen == tokens:
                    return Schedule(rows, list(place), steps, seen, used / count)
        epoch += 1
        if not seen:
            raise LlmselectError("none of the selected rows has a supervised token to train on")
        if tokens is None and epoch == epochs:
            return Schedule(rows, list(place), steps, seen, float(epochs))


def labels(row: Encoded, start: int, stop: int) -> np.ndarray:
    """The row's ids at its supervised tokens `start … stop`, -100 elsewhere."""
    at = np.flatnonzero(row.response)[start:stop]
    out = np.full(len(row.ids), -100, np.int64)
    out[at] = row.ids[at]
    return out


def parts(step: Sequence[int], lengths: Sequence[int], count: int) -> list[list[int]]:
    """Share a step's items out to `count` processes or micro-batches, the longest first to the least loaded.

    A part may be empty.
    """
    out: list[list[int]] = [[] for _ in range(count)]
    load = [0] * count
    for item in sorted(step, key=lambda i: -lengths[i]):
        least = load.index(min(load))
        out[least].append(item)
        load[least] += lengths[item]
    return out
