"""Adapt-∞ against histograms counted by NumPy and coverage-centric selection in each cluster alone; what reads `quality`."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import entropy

from llmselect.errors import LlmselectError, UsageError
from llmselect.kernels.groups import waterfill
from llmselect.kernels.keyed import Keyed
from llmselect.kernels.kmeans import kmeans
from llmselect.kernels.rows import Rows
from llmselect.selectors.adapt_inf import AdaptInf
from llmselect.selectors.car import Car
from llmselect.selectors.ccs import Ccs

pytest.importorskip("faiss")
SEEDS = st.integers(0, 2**32 - 1)


def pool(seed: int, n: int = 120, clusters: int = 3) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((clusters, 5))[rng.integers(0, clusters, n)] + 0.3 * rng.standard_normal((n, 5))
    return x, rng.standard_normal((n, 3)) * [1, 10, 0.1] + rng.standard_exponential((n, 1)) * [1, 0, 0]


def experts(scores: np.ndarray, label: np.ndarray, bins: int, clusters: int) -> np.ndarray:
    """Entropies `[clusters, S]` by SciPy over NumPy's histograms."""
    out = np.zeros((clusters, scores.shape[1]))
    for s, column in enumerate(scores.T):
        z = np.clip((column - column.mean()) / column.std(), -3, 3)
        for c in range(clusters):
            out[c, s] = entropy(np.histogram(z[label == c], bins=bins, range=(-3, 3))[0])
    return out


@settings(max_examples=40)
@given(seed=SEEDS, k=st.integers(1, 120), clusters=st.integers(1, 4), bins=st.sampled_from([5, 50]))
def test_experts_shares_and_strata(seed, k, clusters, bins):
    x, scores = pool(seed)
    made = AdaptInf(clusters=clusters, bins=bins, beta=0.2).select(k, x=x, quality=scores, seed=1)
    label = kmeans(Rows(x), clusters, Keyed(1, np.arange(120, dtype=np.uint64))).label
    expected = experts(scores, label, bins, clusters)
    np.testing.assert_allclose(made.provenance["report"]["entropy"], expected, atol=2e-6)
    assert made.evidence["cluster"].tolist() == label[made.indices].tolist()
    best = expected.round(5).argmax(1)  # equal entropies: the first column
    assert made.evidence["expert"].tolist() == best[label[made.indices]].tolist()
    assert made.evidence["score"].tolist() == scores[made.indices, best[label[made.indices]]].tolist()
    taken = np.bincount(label[made.indices], minlength=clusters)
    assert sorted(taken) == sorted(waterfill(k, np.bincount(label, minlength=clusters)))
    for c in range(clusters):  # inside a cluster it is CCS of these rows alone, with the same draws by row
        own = np.flatnonzero(label == c)
        alone = Ccs(beta=0.2, bins=bins).select(len(own), x=scores[own, best[c]], ids=own.astype(np.uint64), seed=1)
        picked = made.indices[label[made.indices] == c]
        assert picked.tolist() == own[alone.indices][: len(picked)].tolist()
        mine = alone.evidence["stratum"][: len(picked)]
        assert made.evidence["stratum"][label[made.indices] == c].tolist() == mine.tolist()


def test_the_expert_is_the_score_that_tells_rows_of_the_cluster_apart():
    rng = np.random.default_rng(0)
    half = np.arange(400) < 200
    x = np.where(half[:, None], [1.0, 0], [0, 1.0]) + 0.01 * rng.standard_normal((400, 2))
    scores = np.stack([np.where(half, rng.random(400), 0.5), np.where(half, 5.0, 10 * rng.random(400))], 1)
    made = AdaptInf(clusters=2).select(40, x=x, quality=scores)
    assert (made.evidence["expert"] == np.where(half[made.indices], 0, 1)).all()
    assert len(np.unique(half[made.indices])) == 2


def test_one_score_is_ccs_in_every_cluster_and_a_constant_says_nothing():
    x, scores = pool(3)
    one = AdaptInf(clusters=3).select(30, x=x, quality=scores[:, 0])
    assert one.indices.tolist() == AdaptInf(clusters=3).select(30, x=x, quality=scores[:, :1]).indices.tolist()
    with_constant = np.stack([np.full(120, 7.0), scores[:, 0]], 1)
    made = AdaptInf(clusters=3).select(30, x=x, quality=with_constant)
    assert made.indices.tolist() == one.indices.tolist() and set(made.evidence["expert"]) == {1}


def test_mistakes_are_named():
    x, scores = pool(0)
    for wrong in ({"bins": 0}, {"clusters": 0}, {"beta": 1.0}):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            AdaptInf(**wrong)
    with pytest.raises(UsageError, match=r"quality has shape \(120, 3\); 'car' reads 1 axes"):
        Car().select(5, quality=scores, groups=np.zeros(120))
    one = Car().select(5, quality=scores[:, :1], groups=np.zeros(120))  # one column, e.g. a norm at one checkpoint, is one score
    assert one.indices.tolist() == Car().select(5, quality=scores[:, 0], groups=np.zeros(120)).indices.tolist()
    scores[7, 1] = np.nan
    with pytest.raises(LlmselectError, match=r"\[7\]"):
        AdaptInf().select(5, x=x, quality=scores)
