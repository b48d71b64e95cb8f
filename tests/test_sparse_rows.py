"""Sparse rows gathered from shards, against scipy and dense products."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array

from llmselect.errors import LlmselectError
from llmselect.kernels import sparse
from llmselect.kernels.concave import EPSILON, Concave


def some(seed: int, n: int, width: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = rng.random((n, width)) * (rng.random((n, width)) < 0.3)
    x[rng.random(n) < 0.2] = 0
    return x.astype(np.float32)


@settings(max_examples=60)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 40), width=st.integers(1, 12), together=st.integers(1, 60))
def test_products_and_the_gram_matrix_are_the_dense_ones(seed, n, width, together):
    x, rng = some(seed, n, width), np.random.default_rng(seed)
    made = sparse.gathered(csr_array(x))
    assert np.array_equal(made.scipy().toarray(), x) and made.indptr[-1] == np.count_nonzero(x)
    rows, vector = rng.permutation(n)[: rng.integers(0, n + 1)], rng.standard_normal(width)
    np.testing.assert_allclose(sparse.products(made, rows, vector), x[rows].astype(np.float64) @ vector, atol=1e-12)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse, "TOGETHER", together)
        np.testing.assert_allclose(sparse.gram(made).toarray(), x.T.astype(np.float64) @ x, atol=1e-12)


def test_in_files_they_are_the_same(monkeypatch):
    x = some(0, 20_000, 7)  # three blocks
    held = sparse.gathered(x)
    monkeypatch.setattr("llmselect.kernels.room.HELD", 1)
    filed = sparse.gathered(x)
    assert np.array_equal(held.scipy().toarray(), x)
    assert all(np.array_equal(getattr(held, one), getattr(filed, one)) for one in ("indptr", "indices", "data"))


def test_negative_rows_are_named():
    x = some(1, 9000, 4)
    x[8500, 2] = -1
    with pytest.raises(LlmselectError, match=r"\[8500\]"):
        sparse.gathered(x)


@settings(max_examples=40)
@given(seed=st.integers(0, 10**6), power=st.sampled_from([0.3, 0.8, 1.0]))
def test_gains_of_the_concave_function_are_the_slopes_of_its_columns(seed, power):
    x, rng = some(seed, 25, 8), np.random.default_rng(seed)
    weight, spread = rng.random(25), rng.random((8, 8)) * (rng.random((8, 8)) < 0.4)
    made, taken = Concave(sparse.gathered(x), weight, csr_array(spread), power), list[int]()
    v = weight[:, None] * x.astype(np.float64) @ spread
    np.testing.assert_allclose(made.bounds(), v @ np.full(8, power * EPSILON ** (power - 1)), rtol=1e-9)
    for row in rng.permutation(25)[:12].tolist():
        made.add(row)
        taken.append(row)
        slope = power * (v[taken].sum(0) + EPSILON) ** (power - 1)
        np.testing.assert_allclose(made.gains(np.arange(25)), v @ slope, rtol=1e-9, atol=1e-9)
