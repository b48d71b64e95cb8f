"""The longest (or shortest) responses.

Paper: Zhao et al., "Long Is More for Alignment", arXiv 2402.04833; the length baseline of arXiv 2503.01807.
Objective: score = supervised tokens of the row.
Inputs: `cost [n]`.
Cost: O(n).
Deviations: length in tokens of the model that will be tuned, not in characters.
Defaults: longest.
Use: as a control: a score that does not beat it may be a length score.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from llmselect.kernels.keyed import Keyed
from llmselect.registry import selectors
from llmselect.selectors._base import Selector


@selectors.register("length")
@dataclass(frozen=True)
class Length(Selector):
    """Rows by the number of supervised tokens."""

    order: Literal["longest", "shortest"] = field(default="longest", metadata={"help": "which end comes first"})

    def score(self, rng: Keyed, *, cost: Any) -> np.ndarray:
        tokens = np.asarray(cost, np.float64)
        return tokens if self.order == "longest" else -tokens
