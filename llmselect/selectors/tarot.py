"""Rows that carry the target distribution: nearest in whitened features, refined by optimal transport.

Paper: TAROT, arXiv 2412.00420, sections 3 and 4.
Objective: μ, Σ of pool and target rows together; Σ + ridge = LLᵀ; φ_w = unit(L⁻¹(φ - μ)); distance √(2 - 2 cos). Layer i
    holds the i-th nearest row of every target row; whole layers until the budget. Inside a layer rows are ranked by the
    dual potential of the transport from the layer to the target, smallest (cheapest to carry) first.
Inputs: `x [n, d]`, gradient features by preference, any dense feature works; `target [m, d]`; optional `target_groups [m]`.
Cost: covariance and whitening O(n·d²), one GEMM n × m × d, in blocks; O(m·k/m) candidates; one small transport per layer.
Deviations: the ridge is relative, ε·tr(Σ)/d; every layer is ranked, not only the last, so that prefixes are smaller
    budgets. Features wider than `dim` are folded first (a sketch, E⟨Sx, Sy⟩ = ⟨x, y⟩): Σ is dim × dim.
    Weights softmax(-f/τ sd(f)) of the potential of the whole selection are our choice: the paper leaves the map open.
    Where columns are not far fewer than rows, whitening weighs noise like signal (eval/results/tarot): take `whiten: none`.
Defaults: groups of targets take turns; Sinkhorn with ε = 0.05 of the mean cost; no weights.
Use: target examples, and a target that should be covered as a distribution rather than by its nearest rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from llmselect.errors import UsageError
from llmselect.kernels.cosine import best_per_target, unit_targets
from llmselect.kernels.groups import round_robin
from llmselect.kernels.keyed import Keyed
from llmselect.kernels.rows import Rows
from llmselect.kernels.transport import entropic
from llmselect.kernels.whitening import Whitened, Whitening
from llmselect.registry import selectors
from llmselect.selectors._base import Picked, Selector


@selectors.register("tarot")
@dataclass(frozen=True)
class Tarot(Selector):
    """Rows in layers of nearest neighbours. Evidence: `nearest` target row, its whitened `distance`, and the `layer`."""

    whiten: Literal["cholesky", "zca", "none"] = field(default="cholesky", metadata={"help": "none: cosines as they are"})
    across: Literal["round_robin", "pooled"] = field(default="round_robin", metadata={"help": "pooled: one target set"})
    weights: bool = field(default=False, metadata={"help": "weight rows by the transport's potential"})
    ridge: float = field(default=1e-3, metadata={"help": "share of the mean variance that is added to every direction"})
    dim: int = field(default=2048, metadata={"help": "wider features are folded to this many columns"})
    epsilon: float = field(default=0.05, metadata={"help": "of Sinkhorn, as a share of the mean cost"})
    temperature: float = field(default=1.0, metadata={"help": "τ of the weights, in standard deviations"})

    def __post_init__(self) -> None:
        if min(self.ridge, self.dim, self.epsilon, self.temperature) <= 0:
            raise UsageError("ridge, dim, epsilon and temperature must be positive")

    def pick(self, k: int, rng: Keyed, *, x: Any, target: Any, target_groups: Any = None) -> Picked:
        x, targets = whitened(x, target, self.whiten, self.ridge, self.dim)
        named = np.zeros(len(targets)) if target_groups is None or self.across == "pooled" else np.asarray(target_groups)
        group = np.unique(named, return_inverse=True)[1]
        count = min(len(x), max(256, -(-8 * k // len(targets))))
        while True:  # look deeper until every group has ranked k rows
            best, largest = best_per_target(x, targets, count, rng.keys)
            layers = [Layers(np.stack([rows for rows, _ in best])[group == g], len(x)) for g in range(group.max() + 1)]
            if count == len(x) or all(one.rows >= k for one in layers):
                break
            count = min(len(x), 2 * count)
        ranked = [self._ranked(one, x, targets[group == g], k, rng.keys) for g, one in enumerate(layers)]
        order, by = round_robin([rows for rows, _ in ranked], k, len(x))
        layer = np.array([ranked[g][1][row] for row, g in zip(order.tolist(), by.tolist(), strict=True)], np.int64)
        distance = distances(x[order], targets)
        weights = _weights(entropic(distance.astype(np.float64), self.epsilon).source, self.temperature) if self.weights else None
        evidence = {"nearest": distance.argmin(1), "distance": distance.min(1), "layer": layer}
        return Picked(order, largest, weights, evidence)

    def _ranked(self, layers: Layers, x: Any, targets: np.ndarray, k: int, keys: np.ndarray) -> tuple[np.ndarray, dict[int, int]]:
        """Rows layer by layer, at least `k`, and the layer of each."""
        order: list[np.ndarray] = []
        at: dict[int, int] = {}
        for i, rows in enumerate(layers.new):
            if len(at) >= k:
                break
            if len(rows):
                rows = by_potential(distances(x[rows], targets), rows, keys, self.epsilon)
                order.append(rows)
                at |= dict.fromkeys(rows.tolist(), i)
        return np.concatenate(order), at


class Layers:
    """Layer i: the i-th nearest rows of all targets, those of earlier layers left out."""

    def __init__(self, lists: np.ndarray, n: int):
        taken, self.new = np.zeros(n, bool), list[np.ndarray]()
        for column in lists.T:
            rows = np.unique(column[~taken[column]])
            taken[rows] = True
            self.new.append(rows)
        self.rows = int(taken.sum())


def whitened(x: Any, target: Any, kind: Any, ridge: float, dim: int) -> tuple[Whitened, np.ndarray]:
    """Pool rows, whitened when read, and whitened unit targets `[m, d]`."""
    unit_targets(target)  # names targets without a direction
    rows, targets = Rows(x, normalize=False, dim=dim), Rows(target, normalize=False, dim=dim)
    made = None if kind == "none" else Whitening.fit(rows, targets, ridge, kind)
    return Whitened(rows, made), Whitened(targets, made)[:]


def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """√(2 - 2 cos) of unit rows `[n, m]`; cosines in float32 first, or the last bits of equal rows would be magnified."""
    return np.sqrt(np.maximum(2 - 2 * (a @ b.T).astype(np.float32), 0))


def by_potential(distance: np.ndarray, rows: np.ndarray, keys: np.ndarray, epsilon: float) -> np.ndarray:
    """`rows` by the dual potential of the transport to the targets, smallest first; ties by key."""
    order = np.argsort(keys[rows], kind="stable")
    potential = entropic(distance[order].astype(np.float64), epsilon).source if len(rows) > 1 else np.zeros(1)
    return rows[order][np.lexsort((keys[rows[order]], potential.astype(np.float32)))]


def _weights(potential: np.ndarray, temperature: float) -> np.ndarray:
    scaled = -potential / (temperature * max(float(potential.std()), 1e-12))
    weights = np.exp(scaled - scaled.max())
    return weights / weights.sum()
