"""Rows whose skills are those of the target and come together as they do there.

Paper: after MASS of Li et al., "Mathematical Data Selection via Skill Graphs", arXiv 2503.14917. Its equation is not settled by
    the text: this is MASS-style.
Objective: from the target tags T `[m, tags]`, a graph A: A_jj the share of target rows with tag j, A_jl the share with both; the
    score of a row with tags s is s A sᵀ, edges times `edges`. Take the largest.
Inputs: `x [n, tags]` ≥ 0, sparse or dense, how far each tag (skill, latent) is there; `target [m, tags]`.
Cost: O(non-zeros · tags of a target row); A is sparse.
Deviations: ours throughout. Values below `threshold` count as 0, others as they are, or as 1 with `binary`. `per_tag` divides
    the score by ‖s‖₁ of the tags that are left, or rows with many tags always win.
Defaults: binary above 0, edges 1, per tag.
Use: tags of pool and target, where it matters which occur together.
"""

from __future__ import annotations

# scipy has no types.
# pyright: reportMissingTypeStubs=false
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from llmselect.errors import LlmselectError, UsageError
from llmselect.kernels.jaccard import sparse_blocks
from llmselect.kernels.keyed import Keyed
from llmselect.registry import selectors
from llmselect.selectors._base import Selector


@selectors.register("mass")
@dataclass(frozen=True)
class Mass(Selector):
    """Rows by how their tags weigh in the target's graph of tags."""

    sparse: ClassVar[bool] = True
    x_sign: ClassVar[str] = "nonnegative"

    threshold: float = field(default=0.0, metadata={"help": "a tag counts where its value is above"})
    binary: bool = field(default=True, metadata={"help": "tags count 1; false: by their value"})
    edges: float = field(default=1.0, metadata={"help": "weight of pairs of tags; 0: frequencies alone"})
    per_tag: bool = field(default=True, metadata={"help": "divide by the tags of the row"})

    def __post_init__(self) -> None:
        if self.threshold < 0 or self.edges < 0:
            raise UsageError(f"threshold: {self.threshold} and edges: {self.edges} must be 0 or more")

    def score(self, rng: Keyed, *, x: Any, target: Any) -> np.ndarray:
        import scipy.sparse

        sparse: Any = scipy.sparse
        given = np.concatenate([self._kept(rows.scipy()).toarray() for _, rows in sparse_blocks(target)])
        if not given.any():
            raise LlmselectError(f"target: none of {len(given)} rows has a tag above {self.threshold}")
        skills = sparse.csr_array(given)
        together = sparse.csr_array(skills.T @ skills) / len(given)
        own = together.diagonal()
        graph = sparse.csr_array(self.edges * together + sparse.diags_array((1 - self.edges) * own))
        found: list[np.ndarray] = []
        for _, rows in sparse_blocks(x):
            tags = self._kept(rows.scipy())
            weight = np.asarray((tags @ graph).multiply(tags).sum(1)).ravel()
            count = np.asarray(tags.sum(1)).ravel()
            found.append(weight / np.where(count > 0, count, 1) if self.per_tag else weight)
        return np.concatenate(found).astype(np.float32)

    def _kept(self, rows: Any) -> Any:
        """Tags above the threshold, `scipy.sparse.csr_array` in float64."""
        from scipy.sparse import csr_array

        kept: Any = csr_array(rows, dtype=np.float64, copy=True)  # the indices of a store's array cannot be written to
        kept.data = np.where(kept.data > self.threshold, 1.0 if self.binary else kept.data, 0.0)
        kept.eliminate_zeros()
        return kept
