"""Bounds that are brought up to date for all rows at once, and the rows read in float32 for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmselect.kernels import objectives
from llmselect.kernels.greedy import maximize
from llmselect.kernels.half import narrow
from llmselect.kernels.keyed import Keyed
from llmselect.kernels.rows import Rows

OBJECTIVES: dict[str, Callable[[Rows], Any]] = {
    "log_det": lambda x: objectives.LogDet(x, 10),
    "graph_cut": lambda x: objectives.GraphCut(x, 0.5),
    "steep": lambda x: objectives.GraphCut(x, 7.0),
    "kcenter": objectives.Spread,
}


@pytest.mark.parametrize("name", OBJECTIVES)
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), d=st.integers(2, 40), dim=st.sampled_from([None, 12]), zeros=st.booleans())
def test_bounds_brought_up_to_date_are_a_little_above_the_gains(name, seed, d, dim, zeros):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((50, d)).astype(np.float16)
    x[:: 7 if zeros else 99] = 0
    made, exact = (OBJECTIVES[name](Rows(x, dim=dim)) for _ in range(2))
    for step, row in enumerate(rng.permutation(50)[:30].tolist()):
        made.add(row)
        exact.add(row)
        if rng.random() < 0.3:
            made.gains(rng.permutation(50)[:10])
        if step % 4 == 3:
            gains, bounds = exact.gains(np.arange(50)), made.refresh()
            assert (bounds >= gains - 1e-12).all() and (bounds <= gains + 1e-3).all()


def test_rows_in_float32_are_the_rows():
    for x in (np.random.default_rng(0).standard_normal((40, 5)) * 10.0 ** np.arange(-20, 20)[:, None], np.zeros((9, 2))):
        for rows in (Rows(x), Rows(x.astype(np.float32)), Rows(x, normalize=False), Rows(x, dim=2)):
            for start, part in rows.rough_blocks(7):
                np.testing.assert_allclose(part, rows[start : start + 7], rtol=1e-5, atol=1e-6)
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16).reshape(64, 1024)
    assert np.array_equal(narrow(every, np.empty(every.shape, np.float32)), every.astype(np.float32), equal_nan=True)
    for value in (0.37, -0.011):  # sums of equal numbers are rounded the same way
        wide = Rows(np.full((3, 1 << 16), value, np.float16))
        _, part = next(wide.rough_blocks())
        np.testing.assert_allclose(part @ wide[:1].astype(np.float32).T, wide[:3] @ wide[:1].T, atol=objectives.ROUNDING / 2)
    half = Rows(np.random.default_rng(0).standard_normal((1100, 1000)).astype(np.float16))
    for start, part in half.rough_blocks():
        np.testing.assert_allclose(part, half[start : start + len(part)], atol=1e-6)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_lazy_looks_at_few_rows_where_bounds_are_refreshed(name):
    x = np.random.default_rng(0).standard_normal((3000, 24))
    by_key = Keyed(0, np.random.default_rng(1).permutation(3000).astype(np.uint64))
    lazy, naive = (maximize(OBJECTIVES[name](Rows(x)), 100, by_key, how) for how in ("lazy", "naive"))
    assert lazy.order.tolist() == naive.order.tolist() and lazy.gains.tolist() == naive.gains.tolist()
    assert lazy.evaluations < naive.evaluations / 20


@pytest.mark.parametrize("kind", ["copies", "equal"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_rows_that_tie_are_taken_as_by_looking_at_all(name, kind):
    rng = np.random.default_rng(0)
    x = np.repeat(rng.standard_normal((60, 8)), 5, axis=0) if kind == "copies" else np.ones((300, 8))
    by_key = Keyed(0, rng.permutation(300).astype(np.uint64))
    lazy, naive = (maximize(OBJECTIVES[name](Rows(x)), 300, by_key, how) for how in ("lazy", "naive"))
    assert lazy.order.tolist() == naive.order.tolist() and lazy.gains.tolist() == naive.gains.tolist()
