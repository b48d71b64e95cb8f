"""A bandit whose arms are clusters and whose pulls score some of a cluster's rows, without replacement."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

from llmselect.kernels.keyed import Keyed
from llmselect.kernels.kmeans import Clusters

Drawn = list[tuple[int, np.ndarray]]


class Bandit:
    """Upper confidence bounds over clusters.

    CS_i = Ī_i + α·s·√(2 ln Σ_j T_j / T_i), Ī_i the mean reward of the rows scored in cluster i, T_i its pulls, s the standard
    deviation of all rewards; an arm never pulled comes first, one used up never. With `near` > 0, Ī_i and T_i are sums over
    the `near` nearest clusters too, weighted by exp(-d²/h²), h² the mean squared distance of neighbours.

    Attributes: `reward [n]` (NaN: not scored), `round_of [n]` (-1: not scored), `scored` rows, `rounds`, and `trace`.
    """

    def __init__(self, clusters: Clusters, rng: Keyed, *, gamma: float, least: int, alpha: float, near: int = 0):
        self.label, self.sizes, self.alpha = clusters.label, clusters.sizes, alpha
        order = np.lexsort((rng.keys, rng.uniform("bandit"), self.label))
        starts = np.concatenate([[0], np.cumsum(self.sizes)])
        self.left: list[np.ndarray] = [order[a:b] for a, b in itertools.pairwise(starts)]
        self.portion = np.maximum(least, np.ceil(gamma * self.sizes)).astype(np.int64)
        arms = len(self.sizes)
        self.pulls, self.total, self.count = np.zeros(arms), np.zeros(arms), np.zeros(arms)
        self.reward, self.round_of = np.full(len(self.label), np.nan), np.full(len(self.label), -1, np.int32)
        self.rounds, self.scored, self.means, self.trace = 0, 0, list[float](), list[dict[str, Any]]()
        self.weights = _weights(clusters.centroids.astype(np.float64), near)

    def scores(self) -> np.ndarray:
        """CS `[arms]`; +∞ for an arm never pulled, -∞ for one without rows."""
        mean, bonus = self._bounds()
        found = np.where(self.pulls > 0, mean + bonus, np.inf)
        return np.where([len(rows) > 0 for rows in self.left], found, -np.inf)

    def _bounds(self) -> tuple[np.ndarray, np.ndarray]:
        pulls, total, count = self.pulls, self.total, self.count
        if self.weights is not None:
            near, weight = self.weights
            pulls, total, count = ((weight * one[near]).sum(1) for one in (pulls, total, count))
        known = self.reward[np.isfinite(self.reward)]
        spread = float(known.std()) if len(known) else 0.0
        bonus = self.alpha * spread * np.sqrt(2 * np.log(max(self.pulls.sum(), 1)) / np.maximum(pulls, 1e-9))
        return total / np.maximum(count, 1e-9), bonus

    def draw(self, arms: np.ndarray) -> Drawn:
        """The next rows of these arms; arms without rows give none."""
        drawn: Drawn = []
        for arm in map(int, arms.tolist()):
            if len(rows := self.left[arm][: self.portion[arm]]):
                self.left[arm] = self.left[arm][len(rows) :]
                drawn.append((arm, rows))
        return drawn

    def update(self, drawn: Drawn, rewards: np.ndarray, threshold: Callable[[list[float]], float],
               accepting: bool) -> list[np.ndarray]:  # fmt: skip
        """Learn the rewards of a round; the finite rows of every pull whose mean is above the threshold, which is asked for
        once all means of the round are known."""
        bonus, pulled, at = self._bounds()[1], list[tuple[dict[str, Any], np.ndarray]](), 0
        for arm, rows in drawn:
            reward = rewards[at : at + len(rows)]
            at += len(rows)
            self.reward[rows], self.round_of[rows] = reward, self.rounds
            good = np.isfinite(reward)
            first = not self.pulls[arm]
            self.pulls[arm] += 1
            self.total[arm] += reward[good].sum()
            self.count[arm] += good.sum()
            mean = float(reward[good].mean()) if good.any() else None
            self.means += [] if mean is None else [mean]
            told = {"round": self.rounds, "cluster": arm, "rows": len(rows), "mean": mean,
                    "bonus": None if first else float(bonus[arm])}  # fmt: skip
            pulled.append((told, rows[good]))
        least = threshold(self.means) if self.means else 0.0
        for told, _ in pulled:
            told["accepted"] = accepting and told["mean"] is not None and told["mean"] > least
        self.trace += [told for told, _ in pulled]
        self.scored += at
        self.rounds += 1
        return [rows for told, rows in pulled if told["accepted"]]

    def best_first(self, rows: np.ndarray) -> np.ndarray:
        """The rows of a pull by reward, so that a pull cut by the budget gives its best."""
        return rows[np.argsort(-self.reward[rows], kind="stable")]


def _weights(centroids: np.ndarray, near: int) -> tuple[np.ndarray, np.ndarray] | None:
    """The nearest clusters of each (itself first) and exp(-d²/h²)."""
    near = min(near, len(centroids) - 1)
    if near < 1:
        return None
    found, weight = np.empty((len(centroids), near + 1), np.int64), np.empty((len(centroids), near + 1))
    square = (centroids**2).sum(1)
    for start in range(0, len(centroids), 1024):
        distance = np.maximum(square[start : start + 1024, None] + square - 2 * centroids[start : start + 1024] @ centroids.T, 0)
        rows = np.arange(len(distance))
        distance[rows, start + rows] = -1  # itself comes first
        found[start : start + 1024] = np.argsort(distance, axis=1, kind="stable")[:, : near + 1]
        weight[start : start + 1024] = np.take_along_axis(distance, found[start : start + 1024], 1)
    weight[:, 0] = 0
    return found, np.exp(-weight / max(float(weight[:, 1:].mean()), 1e-12))
