"""D2 pruning and QDIT against graphs of all pairs and every row looked at in every step."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmselect.errors import LlmselectError, UsageError
from llmselect.selectors.d2 import D2
from llmselect.selectors.qdit import Qdit

pytest.importorskip("faiss")
SEEDS = st.integers(0, 2**32 - 1)


def pool(seed: int, n: int = 40) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((5, 4))[rng.integers(0, 5, n)] + 0.3 * rng.standard_normal((n, 4)), rng.standard_normal(n)


def graph(x: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """All cosines, and which pairs are neighbours of either side."""
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    cosine = unit @ unit.T
    edge = np.zeros(cosine.shape, bool)
    for i in range(len(x)):
        edge[i, sorted((j for j in range(len(x)) if j != i), key=lambda j: -cosine[i, j])[:k]] = True
    return cosine, edge | edge.T


@settings(max_examples=60)
@given(seed=SEEDS, k=st.integers(1, 8), forward=st.sampled_from([0.0, 1.0, 5.0]), reverse=st.sampled_from([0.1, 1.0, 20.0]))
def test_d2_passes_messages_as_in_the_formula(seed, k, forward, reverse):
    x, quality = pool(seed)
    made = D2(neighbours=k, gamma_forward=forward, gamma_reverse=reverse).select(40, x=x, quality=quality)
    cosine, edge = graph(x, k)
    weight = lambda gamma: np.where(edge, np.exp(-gamma * (2 - 2 * cosine)), 0)  # noqa: E731
    q = quality - quality.min()
    s, free = q + weight(forward) @ q, np.ones(40, bool)
    for row, message in zip(made.indices, made.evidence["message"], strict=True):
        assert s[row] == pytest.approx(message, abs=2e-3)
        assert s[row] > s[free].max() - 2e-3, "the largest left, up to the precision of the graph"
        free[row] = False
        s = s - weight(reverse)[row] * s[row]


def test_d2_is_difficulty_alone_where_messages_fade_and_spreads_where_they_do_not():
    x, quality = pool(1, 200)
    hard = D2(gamma_forward=1e9, gamma_reverse=1e9).select(200, x=x, quality=quality)
    assert hard.indices.tolist() == np.argsort(-quality).tolist()
    x = np.array([[1.0, 0]] * 10 + [[0, 1.0]] * 10) + 1e-3 * np.random.default_rng(0).standard_normal((20, 2))
    quality = np.r_[np.full(10, 2.0), np.full(10, 1.0)] + 1e-3 * np.random.default_rng(1).standard_normal(20)
    quality[15] = 0  # the easiest
    made = D2(neighbours=9, gamma_forward=1e9, gamma_reverse=0.0).select(2, x=x, quality=quality)
    assert sorted((made.indices // 10).tolist()) == [0, 1], "one of each side, although the first is harder"


def gained(x, quality, k, alpha, count):
    cosine, edge = graph(x, k)
    similar = np.where(edge, np.maximum(cosine, 0), 0) + np.eye(len(x))
    q = (quality - quality.min()) / np.ptp(quality)
    scale, order, gains = similar.sum(1).max(), [], []
    for _ in range(count):
        covered = similar[:, order].max(1, initial=0)
        gain = (1 - alpha) * np.maximum(similar - covered[:, None], 0).sum(0) / scale + alpha * q
        gain[order] = -1
        order.append(int(gain.argmax()))
        gains.append(float(gain.max()))
    return order, gains


@settings(max_examples=60)
@given(seed=SEEDS, k=st.integers(1, 39), alpha=st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0]))
def test_qdit_takes_the_largest_gain_at_every_step(seed, k, alpha):
    x, quality = pool(seed)
    made = Qdit(neighbours=k, alpha=alpha).select(40, x=x, quality=quality)
    order, gains = gained(x, quality, k, alpha, 40)
    np.testing.assert_allclose(made.evidence["gain"], gains, atol=1e-5)
    some = int(np.argmax(np.array(gains) < 1e-4)) or 40  # rows that gain nothing go by id
    assert made.indices[:some].tolist() == order[:some]


def test_qdit_between_its_ends():
    x, quality = pool(2, 300)
    assert Qdit(alpha=1.0).select(300, x=x, quality=quality).indices.tolist() == np.argsort(-quality).tolist()
    means = [quality[Qdit(alpha=a).select(30, x=x, quality=quality).indices].mean() for a in (0.0, 0.5, 1.0)]
    assert means[0] < means[1] < means[2]
    shifted = Qdit().select(30, x=x, quality=100 + 7 * quality)
    assert shifted.indices.tolist() == Qdit().select(30, x=x, quality=quality).indices.tolist()
    assert Qdit().select(30, x=x, quality=quality).provenance["report"]["evaluations"] < 300 * 30 / 4


@pytest.mark.parametrize(
    "method,wrong", [(D2, {"neighbours": 0}), (D2, {"gamma_reverse": -1.0}), (Qdit, {"alpha": 1.5}), (Qdit, {"neighbours": 0})]
)
def test_mistakes_are_named(method, wrong):
    with pytest.raises(UsageError, match=next(iter(wrong))):
        method(**wrong)


@pytest.mark.parametrize("method", [D2(), Qdit()])
def test_rows_that_are_not_finite_are_named(method):
    x, quality = pool(0)
    x[3, 0] = np.inf
    with pytest.raises(LlmselectError, match=r"\[3\]"):
        method.select(5, x=x, quality=quality)
