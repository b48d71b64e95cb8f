"""Random rows with equal shares of every source.

Paper: the "balanced" random baseline of arXiv 2503.01807, section 4. With clusters of loss trajectories as
    groups it is S2L, arXiv 2403.07384.
Objective: waterfill k over the groups: shares as equal as the sizes allow; uniform inside each group.
Inputs: `groups [n]`, the source, or cluster, of each row.
Cost: O(n log n).
Deviations: the order is nested: every prefix has waterfill shares up to the one row that the division leaves over.
Defaults: none.
Use: always, beside `random`, as a baseline; alone where all sources count and their sizes differ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from llmselect.kernels.groups import rounds
from llmselect.kernels.keyed import Keyed
from llmselect.registry import selectors
from llmselect.selectors._base import Picked, Selector


@selectors.register("balanced")
@dataclass(frozen=True)
class Balanced(Selector):
    """Rows in rounds: each round takes one random row of every group that has rows left."""

    stochastic: ClassVar[bool] = True

    def pick(self, k: int, rng: Keyed, *, groups: Any) -> Picked:
        names, group = np.unique(np.asarray(groups), return_inverse=True)
        # Within a round the groups come in a random order, or a small budget would always favour the same names.
        order = rounds(group, rng.uniform("row"), rng.uniform("round"), rng.keys)
        return Picked(order[:k], evidence={"group": names[group[order[:k]]]})
