"""Uniform random rows: the baseline to beat.

Paper: none; large studies find that most scores do not beat it at scale (arXiv 2503.01807, 2410.09335).
Objective: every subset of k rows is equally likely.
Inputs: none (the number of rows).
Cost: O(n).
Deviations: a row's draw depends on (seed, row id) alone, so permuting or sharding the pool changes nothing.
Defaults: none.
Use: always: nothing else shows whether a method gains anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from llmselect.kernels.keyed import Keyed
from llmselect.registry import selectors
from llmselect.selectors._base import Selector


@selectors.register("random")
@dataclass(frozen=True)
class Random(Selector):
    """Rows by their keyed uniform draw."""

    stochastic: ClassVar[bool] = True

    def score(self, rng: Keyed) -> np.ndarray:
        return rng.uniform("random")
