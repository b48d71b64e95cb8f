"""Rows of high influence, found by a bandit over clusters that scores a part of the pool.

Paper: Quad, arXiv 2409.16986, sections 3 and 4; `accept: top` as ClusterUCB, arXiv 2506.10288.
Objective: k-means clusters are arms with score CS_i = Ī_i + α·s·√(2 ln Σ_j T_j / T_i): mean reward of the rows scored so far,
    pulls T, and s, the standard deviation of all rewards seen. Every arm is pulled once; then, in rounds, the `arms` of highest
    score. A pull scores the next γ·|C_i| rows of the cluster. `draws` accepts a pull whose mean is above τ, until the budget;
    `top` scores a `share` of the pool and takes the best rows scored.
Inputs: `x [n, d]`, an embedding to cluster; `quality [n]` or `[n, G]` (mean over G), the reward, lazy by preference: rows that
    are never scored are never computed.
Cost: k-means; rewards of the rows scored, in one request a round; O(clusters) a round.
Deviations: α, γ and τ are open in the paper: ours scale themselves. A cluster that is small is used up, not left out. The last
    pull accepted gives its best rows, so that the budget is exact. Rows whose reward is not finite are passed over.
Defaults: a cluster per 200 rows, pulls of 5 % of a cluster but at least 8 rows, α = 0.5, τ the running median of pull means.
Use: influence on a target is wanted and costs too much for every row.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np

from llmselect.errors import LlmselectError, UsageError
from llmselect.kernels.bandit import Bandit
from llmselect.kernels.keyed import Keyed
from llmselect.kernels.kmeans import kmeans
from llmselect.kernels.rows import Rows
from llmselect.kernels.topk import topk_stable
from llmselect.registry import selectors
from llmselect.selectors._base import Picked, Selector


@selectors.register("quad")
@dataclass(frozen=True)
class Quad(Selector):
    """Evidence: the `cluster` of each row, its `reward`, and the `round` in which it was scored. The report tells the share
    scored and every pull: round, cluster, rows, mean reward, bonus, accepted."""

    stochastic: ClassVar[bool] = True
    nested: ClassVar[bool] = False
    quality_ndim: ClassVar[tuple[int, ...]] = (1, 2)
    lazy: ClassVar[tuple[str, ...]] = ("quality",)

    accept: Literal["draws", "top"] = field(default="draws", metadata={"help": "draws: Quad; top: ClusterUCB"})
    clusters: int | None = field(default=None, metadata={"help": "arms; null: one per 200 rows, 2 to 10,000"})
    alpha: float = field(default=0.5, metadata={"help": "weight of the bonus, in standard deviations of rewards"})
    gamma: float = field(default=0.05, metadata={"help": "share of a cluster that one pull scores"})
    least: int = field(default=8, metadata={"help": "rows of a pull at least"})
    arms: float = field(default=0.1, metadata={"help": "share of the arms pulled in a round"})
    quantile: float = field(default=0.5, metadata={"help": "τ as a quantile of the pull means seen so far"})
    threshold: float | None = field(default=None, metadata={"help": "τ as a number, instead of the quantile"})
    share: float = field(default=0.3, metadata={"help": "of the pool that `top` scores"})
    neighbours: int = field(default=0, metadata={"help": "clusters near by whose rewards count too, by distance"})

    def __post_init__(self) -> None:
        shares = {"gamma": self.gamma, "arms": self.arms, "share": self.share}
        if wrong := [name for name, value in shares.items() if not 0 < value <= 1]:
            raise UsageError(f"{wrong[0]}: {shares[wrong[0]]} must lie between 0 and 1")
        if self.clusters is not None and self.clusters < 1:
            raise UsageError(f"clusters: {self.clusters} must be at least 1, or null")
        if not 0 <= self.quantile < 1 or self.alpha < 0 or self.least < 1 or self.neighbours < 0:
            raise UsageError("quantile must lie in [0, 1), alpha and neighbours not be negative, least be at least 1")

    def pick(self, k: int, rng: Keyed, *, x: Any, quality: Any) -> Picked:
        if not hasattr(quality, "lazy"):
            quality = np.asarray(quality, np.float64)
            topk_stable(quality.reshape(len(quality), -1).sum(1), 0, rng.keys)  # names rows that are not finite
        n = x.shape[0]
        made = kmeans(Rows(x), self.clusters or max(2, min(10_000, n // 200, n)) if n > 1 else 1, rng)
        bandit = Bandit(made, rng, gamma=self.gamma, least=self.least, alpha=self.alpha, near=self.neighbours)
        accepted: list[np.ndarray] = []
        while not self._enough(bandit, accepted, k, n):
            scores = bandit.scores()
            count = len(scores) if not bandit.rounds else max(1, int(self.arms * len(scores)))
            drawn = bandit.draw(np.argsort(-scores, kind="stable")[:count])
            if not drawn:
                break
            rows = np.concatenate([rows for _, rows in drawn])
            rewards = np.asarray(quality[rows], np.float64).reshape(len(rows), -1).mean(1)
            accepted += bandit.update(drawn, rewards, self._threshold, self.accept == "draws")
        return self._picked(k, bandit, accepted, rng, n)

    def _threshold(self, means: list[float]) -> float:
        return self.threshold if self.threshold is not None else float(np.quantile(means, self.quantile))

    def _enough(self, bandit: Bandit, accepted: list[np.ndarray], k: int, n: int) -> bool:
        if self.accept == "draws":
            return sum(map(len, accepted)) >= k
        return bandit.scored >= max(k, int(self.share * n))

    def _picked(self, k: int, bandit: Bandit, accepted: list[np.ndarray], rng: Keyed, n: int) -> Picked:
        rows = np.flatnonzero(np.isfinite(bandit.reward))
        if len(rows) < k:
            raise LlmselectError(f"quad: {len(rows)} rows of {n} have a finite reward, fewer than the {k} wanted")
        if self.accept == "top":
            order = rows[topk_stable(bandit.reward[rows], k, rng.keys[rows])]
        else:
            order = np.concatenate([np.zeros(0, np.int64), *(bandit.best_first(part) for part in accepted)])[:k]
            rest = np.setdiff1d(rows, order)  # of rejected pulls, when there is nothing else left
            order = np.concatenate([order, rest[topk_stable(bandit.reward[rest], k - len(order), rng.keys[rest])]])
        evidence = {"cluster": bandit.label[order], "reward": bandit.reward[order], "round": bandit.round_of[order]}
        report = {"scored": bandit.scored, "share_scored": bandit.scored / n, "rounds": bandit.rounds,
                  "clusters": len(bandit.sizes), "trace": bandit.trace}  # fmt: skip
        return Picked(order, bandit.reward, evidence=evidence, report=report)
