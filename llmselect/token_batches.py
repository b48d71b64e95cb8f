"""A planned step as micro-batches: the share of each process, in pieces that fit into memory."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llmselect.packing import Collator
from llmselect.token_steps import Schedule, Segment, labels, parts


def accumulation(plan: Schedule, micro_tokens: int, processes: int, packing: bool) -> int:
    """Micro-batches per step and process, the same for all steps, so that none has more than `micro_tokens` tokens.

    A row longer than `micro_tokens` stays whole: it is then a micro-batch of its own.
    """
    from llmselect.engine.batch import plan as cut

    most = 1
    for step in plan.steps:
        lengths = _lengths(plan, step)
        pieces = -(-sum(lengths) // micro_tokens) if packing else len(cut(lengths, micro_tokens))
        most = max(most, -(-pieces // processes))
    return most


def spread(lengths: Sequence[int], count: int, packing: bool) -> list[list[int]]:
    """Item numbers in `count` pieces of like cost; a piece may be empty.

    Padded pieces hold neighbours in length, cut so that the most expensive (rows × longest row) is as cheap as
    neighbours allow. Packed ones hold like numbers of tokens.
    """
    from llmselect.engine.batch import plan as cut

    if packing:
        return parts(range(len(lengths)), lengths, count)
    limits = range(1, len(lengths) * max(lengths) + 1)
    limit = limits[bisect_left(limits, True, key=lambda limit: len(cut(lengths, limit)) <= count)]
    pieces = [piece.tolist() for piece in cut(lengths, limit)]
    return pieces + [[]] * (count - len(pieces))


@dataclass(frozen=True)
class MicroBatches:
    """What one process reads, in order: `accumulation` micro-batches for every step, made when asked for."""

    plan: Schedule
    collate: Collator
    accumulation: int
    processes: int
    rank: int
    packing: bool

    def __len__(self) -> int:
        return len(self.plan.steps) * self.accumulation

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Tensors of one micro-batch."""
        if not 0 <= number < len(self):
            raise IndexError(number)
        pieces = [(self.plan.rows[place], start, stop) for place, start, stop in self.segments(number)]
        told = [(row.ids.tolist(), labels(row, start, stop).tolist()) for row, start, stop in pieces]
        return self.collate([{"input_ids": ids, "labels": labelled} for ids, labelled in told])

    def segments(self, number: int) -> list[Segment]:
        """The rows of a micro-batch and which of their supervised tokens count in it."""
        step = self.plan.steps[number // self.accumulation]
        lengths = _lengths(self.plan, step)
        pieces = spread(lengths, self.accumulation * self.processes, self.packing)
        piece = pieces[number % self.accumulation * self.processes + self.rank]
        if piece:
            return [step[i] for i in piece]
        # Every process must take part in every micro-batch; a row without labels adds nothing to loss or gradient.
        return [(step[min(range(len(step)), key=lengths.__getitem__)][0], 0, 0)]


def _lengths(plan: Schedule, step: Sequence[Segment]) -> list[int]:
    return [len(plan.rows[row].ids) for row, _, _ in step]
