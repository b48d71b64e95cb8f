"""Rows of many tags first, each adding a tag that the rows before it lack.

Paper: InsTag of Lu et al., "#InsTag: Instruction Tagging for Analyzing Supervised Fine-tuning of LLMs", arXiv
    2308.07074 (complexity-first diverse sampling).
Objective: order rows by their number of tags, most first. Go through them and take a row if one of its tags is in no row
    taken in this pass; after the last row begin a new pass over the rows left, with no tag seen; until k are taken.
Inputs: `x [n, tags]` ≥ 0, sparse or dense: a row has the tags whose value is above 0.
Cost: every non-zero is read twice, O(tags) memory: the pass of a row follows from counters of its tags, so passes cost
    nothing.
Deviations: tags are any non-negative feature (an SAE's latents too); rows without a tag come last.
Defaults: no hyper-parameters.
Use: tags (or SAE latents) and a wish for breadth; no target.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from llmselect.kernels.jaccard import rows_of, sparse_blocks
from llmselect.kernels.keyed import Keyed
from llmselect.kernels.topk import topk_stable
from llmselect.registry import selectors
from llmselect.selectors._base import Picked, Selector


@selectors.register("instag")
@dataclass(frozen=True)
class InsTag(Selector):
    """Rows by pass and number of tags. Evidence: the `round` (pass, from 0) that took the row and its number of `tags`."""

    sparse: ClassVar[bool] = True
    x_sign: ClassVar[str] = "nonnegative"

    def pick(self, k: int, rng: Keyed, *, x: Any) -> Picked:
        tags = np.zeros(x.shape[0], np.int64)
        for start, rows in sparse_blocks(x):
            filled = np.flatnonzero(rows.data > 0)
            row = np.searchsorted(rows.indptr, filled, side="right") - 1
            tags[start : start + len(rows)] = np.bincount(row, minlength=len(rows))
        ranked = topk_stable(tags, len(tags), rng.keys)
        # A row is taken in a pass only after every earlier pass had seen all its tags. So the passes that have seen a
        # tag are 0 … seen - 1, and a row falls to the first pass that one of its tags is new to.
        seen, turn = np.zeros(x.shape[1], np.int64), np.full(len(tags), len(tags))
        for i, (columns, values) in zip(ranked, rows_of(x, ranked), strict=True):
            held = columns[values > 0]
            if len(held):
                turn[i] = seen[held].min()
                seen[held] = np.maximum(seen[held], turn[i] + 1)
        order = ranked[np.argsort(turn[ranked], kind="stable")][:k]
        return Picked(order, tags, evidence={"round": turn[order], "tags": tags[order]})
