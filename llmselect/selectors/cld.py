"""Rows whose loss moves as the target's does while a model trains.

Paper: CLD, "correlation of loss differences", arXiv 2508.20230; with `difference: false` LTC, "loss trajectory
    correlation", arXiv 2503.09721.
Objective: r_i = Pearson correlation of Δℓ_i and Δℓ̄ over the steps between checkpoints, Δℓ a row's differences of loss, ℓ̄
    the mean loss of a target group; LTC correlates ℓ_i and ℓ̄ themselves. Take the largest; groups take turns, or
    `across` their mean or maximum.
Inputs: `x [n, T]`, the loss of each row at T checkpoints in the order of training (the `loss` feature of each, stacked);
    `target [m, T]`; optional `target_groups [m]`.
Cost: O(n·T·G) in blocks, O(n·G) memory.
Deviations: a row whose loss does not move, to 1e-6 of its size, has r = 0. Evidence `z` = atanh(r)·√(t - 3) over the t
    numbers correlated, about normal for a row of noise. Take 16 to 24 checkpoints: with 4 (3 differences) one noise row
    in seven has r > 0.9.
Defaults: differences; turns between groups.
Use: target examples, and a warm-up of which 16 or more checkpoints can be kept.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from llmselect.errors import LlmselectError, UsageError
from llmselect.kernels.cosine import similarity_blocks, unit_targets
from llmselect.kernels.groups import round_robin
from llmselect.kernels.keyed import Keyed
from llmselect.kernels.topk import topk_stable
from llmselect.registry import selectors
from llmselect.selectors._base import Picked, Selector


class _Centred:
    """Rows of trajectories made ready for a cosine, which then is Pearson's correlation."""

    def __init__(self, x: Any, difference: bool):
        self.x, self.difference = x, difference
        self.shape = (x.shape[0], x.shape[1] - difference)

    def __getitem__(self, rows: Any) -> np.ndarray:
        losses = np.asarray(self.x[rows], np.float64)
        moves = np.diff(losses, axis=1) if self.difference else losses
        centred = moves - moves.mean(1, keepdims=True)
        # What is left of a constant is rounding, and it would correlate with anything.
        still = np.abs(centred).max(1) <= 1e-6 * np.abs(losses).max(1)
        return np.where(still[:, None], 0.0, centred)


@selectors.register("cld")
@dataclass(frozen=True)
class Cld(Selector):
    """Rows by correlation of loss trajectories. Evidence: the target `group` that correlates most or picked the row, its
    `r` and `z`."""

    difference: bool = field(default=True, metadata={"help": "false: LTC, the losses themselves"})
    across: Literal["round_robin", "mean", "max"] = field(default="round_robin", metadata={"help": "over target groups"})

    def pick(self, k: int, rng: Keyed, *, x: Any, target: Any, target_groups: Any = None) -> Picked:
        moves = _Centred(x, self.difference)
        if (steps := moves.shape[1]) < 3:
            raise UsageError(f"x has losses at {x.shape[1]} checkpoints; a correlation needs at least {3 + self.difference}: "
                             "give warmup.train more checkpoints, and steps enough for them")  # fmt: skip
        named = np.zeros(len(target)) if target_groups is None else np.asarray(target_groups)
        groups, group = np.unique(named, return_inverse=True)
        if len(bad := np.flatnonzero(~np.isfinite(target).all(1))):
            raise LlmselectError(f"target rows {bad[:5].tolist()} have no finite loss; leave out rows without response tokens")
        means = _Centred(np.stack([target[group == g].mean(0, dtype=np.float64) for g in range(len(groups))]), self.difference)
        if len(bad := groups[~means[:].any(1)]):
            which = "the target" if target_groups is None else f"target groups {bad.tolist()}"
            raise LlmselectError(f"the mean loss of {which} moves evenly or not at all: no row correlates with it")
        correlation = np.empty((x.shape[0], len(groups)), np.float32)
        for start, block in similarity_blocks(moves, unit_targets(means)):
            correlation[start : start + len(block)] = block
        if self.across == "round_robin" and len(groups) > 1:
            order, by = round_robin([topk_stable(r, k, rng.keys) for r in correlation.T], k, len(correlation))
            scores = correlation
        else:
            scores = correlation.max(1) if self.across == "max" else correlation.mean(1, dtype=np.float64)
            order = topk_stable(scores, k, rng.keys)
            by = correlation[order].argmax(1)
        r = correlation[order, by].astype(np.float64)
        evidence = {"group": groups[by], "r": r}
        if steps > 3:
            evidence["z"] = np.arctanh(np.clip(r, -1 + 1e-7, 1 - 1e-7)) * np.sqrt(steps - 3)
        return Picked(order, scores, evidence=evidence)
