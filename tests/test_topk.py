"""`topk` with `order: middle` against ranks counted one by one, and the best rows of many columns against a whole sort."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmselect.errors import UsageError
from llmselect.kernels.topk import best_per_column
from llmselect.selectors.topk import TopK


@settings(max_examples=200)
@given(values=st.lists(st.integers(-4, 4) | st.floats(-1e30, 1e30), min_size=1, max_size=30), data=st.data())
def test_middle_rows_are_nearest_to_the_median_rank(values, data):
    k = data.draw(st.integers(1, len(values)))
    below = [sum(w < v for w in values) for v in values]
    rank = [b + (sum(w == v for w in values) - 1) / 2 for b, v in zip(below, values, strict=True)]
    away = [abs(r - (len(values) - 1) / 2) for r in rank]
    made = TopK(order="middle").select(k, x=np.array(values, np.float64))
    assert made.indices.tolist() == sorted(range(len(values)), key=lambda i: (away[i], i))[:k]


def test_middle_of_distinct_scores_is_centred_however_skewed():
    x = np.exp(np.random.default_rng(0).permutation(101) / 4.0)
    ranks = np.argsort(np.argsort(x))
    for k in (1, 3, 41, 101):
        made = TopK(order="middle").select(k, x=x)
        assert sorted(ranks[made.indices]) == list(range(50 - k // 2, 51 + k // 2))


def test_groups_have_a_middle_each():
    x = np.array([[0.0, 9.0], [1.0, 4.0], [2.0, 3.0], [3.0, 2.0], [9.0, -5.0], [8.0, 8.0], [7.0, 7.0]])
    made = TopK(order="middle").select(2, x=x)
    assert made.indices.tolist() == [3, 1]  # medians: 3.0 (row 3), 4.0 (row 1)
    away = np.abs(np.argsort(np.argsort(x, axis=0), axis=0) - 3).astype(float)
    assert np.array_equal(TopK(order="middle", reduce="mean").select(7, x=x).scores, -away.mean(1))
    assert np.array_equal(TopK(order="middle", reduce="max").select(7, x=x).scores, -away.min(1))


def test_weights_of_columns():
    x = np.random.default_rng(0).standard_normal((30, 3))
    expected = [(1.1 * a + 7 * b + 0.5 * c) / 8.6 for a, b, c in x]
    made = TopK(reduce="mean", weights=(1.1, 7, 0.5)).select(30, x=x)
    np.testing.assert_allclose(made.scores, expected)
    assert made.indices.tolist() == sorted(range(30), key=lambda i: -expected[i])
    for options in (
        {"weights": (1.0, 2.0, 3.0)},
        {"reduce": "mean", "weights": (1.0, -2.0, 3.0)},
        {"reduce": "mean", "weights": ()},
    ):
        with pytest.raises(UsageError, match="weights: "):
            TopK(**options)
    with pytest.raises(UsageError, match="2 are given, x has 3 columns"):
        TopK(reduce="mean", weights=(1.0, 2.0)).select(3, x=x)


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(1, 80),
    count=st.integers(1, 30),
    size=st.integers(1, 25),
    shape=st.sampled_from(["drawn", "rising", "falling", "equal"]),
)
def test_best_per_column_is_a_sort_of_the_whole_column(seed, n, count, size, shape):
    rng = np.random.default_rng(seed)
    values = rng.integers(-3, 4, (n, 3)).astype(np.float32)
    if shape != "drawn":
        values = {"rising": np.sort(values, 0), "falling": -np.sort(-values, 0), "equal": np.zeros_like(values)}[shape]
    keys = rng.permutation(n).astype(np.uint64)
    blocks = ((start, values[start : start + size]) for start in range(0, n, size))
    best, largest = best_per_column(blocks, n, 3, count, keys)
    for j, (rows, kept) in enumerate(best):
        expected = np.lexsort((keys, -values[:, j]))[:count]
        assert rows.tolist() == expected.tolist() and np.array_equal(kept, values[expected, j])
    assert np.array_equal(largest, values.max(1))
