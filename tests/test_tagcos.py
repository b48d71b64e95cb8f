"""TAGCOS and its matching pursuit against least squares computed anew at every step."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmselect.errors import UsageError
from llmselect.kernels.groups import waterfill
from llmselect.kernels.keyed import Keyed
from llmselect.kernels.kmeans import kmeans
from llmselect.kernels.pursuit import pursue
from llmselect.kernels.rows import Rows
from llmselect.selectors.tagcos import Tagcos

pytest.importorskip("faiss")
SEEDS = st.integers(0, 2**32 - 1)


def naive(x: np.ndarray, aim: np.ndarray, count: int) -> tuple[list[int], list[float]]:
    """Orthogonal matching pursuit, the residual by least squares on the rows taken."""
    order, left = [], []
    for _ in range(count):
        taken = x[order].T
        rest = aim - taken @ np.linalg.lstsq(taken, aim, rcond=None)[0] if order else aim
        inner = x @ rest
        inner[order] = -np.inf
        order.append(int(inner.argmax()))
        taken = x[order].T
        left.append(np.linalg.norm(aim - taken @ np.linalg.lstsq(taken, aim, rcond=None)[0]) / np.linalg.norm(aim))
    return order, left


@settings(max_examples=60)
@given(seed=SEEDS, n=st.integers(10, 40), normalize=st.booleans())
def test_pursuit_is_that_of_least_squares(seed, n, normalize):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, 12)) + 0.3
    rows, members = Rows(x, normalize=normalize), np.sort(rng.permutation(n)[: n - 2])
    held = rows[np.arange(n)]
    aim = held[members].mean(0)
    order, left = pursue(rows, members, aim, 8, np.arange(n, dtype=np.uint64))
    expected, share = naive(held[members], aim, 8)
    assert order.tolist() == members[expected].tolist()
    np.testing.assert_allclose(left, share, atol=1e-9)


def test_when_nothing_is_left_the_aim_is_matched_anew_and_ties_go_by_key():
    x = np.repeat(np.eye(3), 4, axis=0)  # three directions, four copies of each
    keys = np.arange(12, dtype=np.uint64)[::-1].copy()
    order, left = pursue(Rows(x), np.arange(12), x.mean(0), 12, keys)
    assert [sorted((order[i : i + 3] // 4).tolist()) for i in range(0, 12, 3)] == [[0, 1, 2]] * 4
    assert order.tolist() == [11, 7, 3, 10, 6, 2, 9, 5, 1, 8, 4, 0]
    np.testing.assert_allclose(left.reshape(4, 3), [[np.sqrt(2 / 3), np.sqrt(1 / 3), 0]] * 4, atol=1e-7)


@settings(max_examples=25)
@given(seed=SEEDS, k=st.integers(1, 90), clusters=st.integers(1, 6))
def test_clusters_share_by_waterfill_and_each_is_pursued(seed, k, clusters):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((clusters, 6))[rng.integers(0, clusters, 90)] + 0.4 * rng.standard_normal((90, 6))
    made = Tagcos(clusters=clusters).select(k, x=x, seed=3)
    label = kmeans(Rows(x), clusters, Keyed(3, np.arange(90, dtype=np.uint64))).label
    assert made.evidence["cluster"].tolist() == label[made.indices].tolist()
    sizes = np.bincount(label, minlength=clusters)
    taken = np.bincount(label[made.indices], minlength=clusters)
    assert sorted(taken) == sorted(waterfill(k, sizes)) and taken.sum() == k
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    for c in np.flatnonzero(taken):
        members, count = np.flatnonzero(label == c), min(int(taken[c]), 4)  # from the sixth on rows span everything
        expected, _ = naive(unit[members], unit[members].mean(0), count)
        assert made.indices[label[made.indices] == c][:count].tolist() == members[expected].tolist()


def test_the_rows_stand_for_the_mean_better_than_chance():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4, 40))[rng.integers(0, 4, 800)] + rng.standard_normal((800, 40))
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)

    def left(rows) -> float:
        taken = unit[rows].T
        return float(np.linalg.norm(unit.mean(0) - taken @ np.linalg.lstsq(taken, unit.mean(0), rcond=None)[0]))

    assert left(Tagcos(clusters=4).select(12, x=x).indices) < 0.8 * min(left(rng.permutation(800)[:12]) for _ in range(30))


def test_mistakes_are_named():
    with pytest.raises(UsageError, match="clusters: 0"):
        Tagcos(clusters=0)
    with pytest.raises(UsageError, match="clusters: 9 is not between 1 and the 5 rows"):
        Tagcos(clusters=9).select(2, x=np.eye(5))
