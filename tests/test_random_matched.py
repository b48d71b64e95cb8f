"""Length-matched random rows: shares of the target's length bins in every prefix, uniform inside, nearest lengths last."""

from __future__ import annotations

import numpy as np
import pytest

from llmselect.errors import UsageError
from llmselect.selectors.random_matched import RandomMatched

COST = np.random.default_rng(0).integers(1, 200, 3000)
TARGET = np.array([10, 12, 14, 16, 40, 42, 44, 46, 90, 100])


def naive_bins(values, edges):
    """The bin of each value by a loop: (edge below, edge], the first closed, -1 outside."""
    out = []
    for v in values:
        found = [j for j in range(len(edges) - 1) if edges[j] < v <= edges[j + 1]]
        out.append(0 if v == edges[0] else found[0] if found else -1)
    return np.array(out)


def test_every_prefix_has_the_shares_of_the_target():
    made = RandomMatched(bins=5).select(400, seed=3, cost=COST, target_cost=TARGET)
    edges = [10, 12, 16, 42, 46, 100]  # every second of ten sorted lengths
    np.testing.assert_array_equal(made.evidence["bin"], naive_bins(COST[made.indices], edges))
    share = np.bincount(naive_bins(TARGET, edges), minlength=5) / 10
    sizes = np.bincount(naive_bins(COST, edges)[naive_bins(COST, edges) >= 0], minlength=5)
    full = min(int(size / s) for size, s in zip(sizes, share, strict=True))  # the first bin runs out here
    for k in range(1, min(400, full - 5)):
        counts = np.bincount(made.evidence["bin"][:k], minlength=5)
        assert np.abs(counts - k * share).max() <= 2, k


def test_target_groups_weigh_the_same_whatever_their_size():
    lengths, groups = np.array([10] * 90 + [100] * 10), np.array(["a"] * 90 + ["b"] * 10)
    cost = np.array([10, 100] * 200)
    alone = RandomMatched(bins=2).select(100, cost=cost, target_cost=lengths)
    equal = RandomMatched(bins=2).select(100, cost=cost, target_cost=lengths, target_groups=groups)
    assert (cost[equal.indices] == 10).sum() in (50, 49, 51)
    assert (cost[alone.indices] == 10).sum() == pytest.approx(90, abs=1)


def test_rows_of_other_lengths_come_last_and_the_nearest_first():
    cost = np.array([1, 20, 30, 31, 35, 90, 28])
    made = RandomMatched().select(7, cost=cost, target_cost=np.array([20, 25, 30]))
    assert sorted(cost[made.indices[:3]]) == [20, 28, 30]
    assert cost[made.indices[3:]].tolist() == [31, 35, 1, 90]
    assert (made.evidence["bin"][3:] == -1).all()


def test_rows_of_a_bin_are_drawn_alike():
    cost = np.repeat([10, 50], 10)
    hits = sum(np.bincount(RandomMatched(bins=2).select(4, seed=s, cost=cost, target_cost=np.array([10, 10, 50, 50])).indices,
                           minlength=20) for s in range(500))  # fmt: skip
    assert np.abs(hits - 100).max() < 5 * np.sqrt(500 * 0.2 * 0.8)


def test_mistakes_are_named():
    with pytest.raises(UsageError, match=r"bins: 0"):
        RandomMatched(bins=0)
    with pytest.raises(UsageError, match="target_cost has no rows"):
        RandomMatched().select(1, cost=COST, target_cost=np.zeros(0))
