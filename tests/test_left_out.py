"""What selectors are told of rows: those left out, what rows cost, and budgets that arithmetic on arrays gave."""

from __future__ import annotations

import numpy as np
import pytest

from llmselect.errors import LlmselectError, UsageError
from llmselect.mixing import Limits, select_within
from llmselect.selection import Budget
from llmselect.selectors import InsTag, KmRandom, Length, Random, TopK

N = 9
X = np.arange(2 * N).reshape(N, 2)


@pytest.mark.parametrize("value", [np.int64(5), np.float32(0.25), {"rows": np.uint8(5)}, {"fraction": np.float32(0.25)}], ids=str)
def test_numbers_of_numpy_are_numbers(value):
    assert Budget.parse(value).plain() in ({"rows": 5}, {"fraction": 0.25})


@pytest.mark.parametrize("value", [np.int64(0), np.float64("nan"), np.float32(2.5), np.bool_(True)], ids=repr)
def test_numbers_of_numpy_that_are_no_budget(value):
    with pytest.raises(UsageError):
        Budget.parse(value)


def test_row_numbers_are_whole_numbers():
    with pytest.raises(UsageError, match=r"np\.flatnonzero\(mask\)"):
        Random().select(2, n=N, exclude=np.arange(N) < 3)  # would leave out rows 0 and 1
    with pytest.raises(UsageError, match="float64 values are no row numbers"):
        Random().select(2, n=N, exclude=[0.5])
    assert len(Random().select(N, n=N, exclude=[])) == N


def test_a_pool_of_which_nothing_is_left():
    with pytest.raises(LlmselectError, match="none of 9 rows is left by the 9 excluded"):
        Random().select(2, n=N, exclude=range(N))


@pytest.mark.parametrize(("selector", "inputs"), [(InsTag(), {"x": X}), (TopK(), {"x": X}), (Length(), {"cost": X[:, 0]})])
def test_a_row_left_out_has_no_score_even_among_whole_numbers(selector, inputs):
    scores = selector.select(3, exclude=[1, 4], **inputs).scores.reshape(N, -1)
    assert np.isnan(scores[[1, 4]]).all() and np.isfinite(np.delete(scores, [1, 4], 0)).all()


@pytest.mark.parametrize("wrong", [np.nan, -9.0, 2.5, np.inf])
def test_a_cost_that_no_row_has(wrong):
    cost = np.where(np.arange(N) == 4, wrong, 3.0)
    with pytest.raises(UsageError, match=rf"cost: rows \[4\] hold \[{wrong}\]"):
        Random().select({"tokens": 20}, cost=cost)
    with pytest.raises(UsageError, match=rf"cost: rows \[4\] hold \[{wrong}\]"):
        select_within(Random(), {"tokens": 20}, Limits(caps={"a": 0.5}), groups=np.array(list("ababababa")), cost=cost)


def test_one_row_is_one_cluster():
    assert KmRandom().select(1, x=np.eye(N), exclude=range(1, N)).indices.tolist() == [0]


def test_columns_that_take_turns_are_not_made_comparable():
    with pytest.raises(UsageError, match="give reduce: mean or max too"):
        TopK(standardize=True)
