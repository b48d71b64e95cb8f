"""BM25 against the formula in plain loops, and against a draft over full rankings."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array

from llmselect.errors import LlmselectError, UsageError
from llmselect.selectors.bm25 import Bm25

SEEDS = st.integers(0, 2**32 - 1)


def counts(seed: int, n: int, width: int = 12) -> np.ndarray:
    rng = np.random.default_rng(seed)
    made = (rng.integers(1, 6, (n, width)) * (rng.random((n, width)) < 0.4)).astype(np.float64)
    made[:, 0] += ~made.any(1)
    return made


def okapi(x: np.ndarray, target: np.ndarray, k1: float, b: float) -> np.ndarray:
    n, average = len(x), x.sum() / len(x)
    out = np.zeros((n, len(target)))
    for i, row in enumerate(x):
        for j, query in enumerate(target):
            for term in range(x.shape[1]):
                holding = sum(other[term] > 0 for other in x)
                idf = math.log(1 + (n - holding + 0.5) / (holding + 0.5))
                if row[term]:
                    saturated = row[term] * (k1 + 1) / (row[term] + k1 * (1 - b + b * row.sum() / average))
                    out[i, j] += query[term] * idf * saturated
    return out


def draft(columns: list[np.ndarray], turns: list[int], k: int) -> list[int]:
    """Columns in the order `turns`, over and over; each gives its best row not yet taken, ties by row number."""
    taken: list[int] = []
    while len(taken) < k:
        for which in turns[: k - len(taken)]:
            free = [i for i in range(len(columns[which])) if i not in taken]
            taken.append(min(free, key=lambda i: (-columns[which][i], i)))
    return taken


@settings(max_examples=40)
@given(seed=SEEDS, k=st.integers(1, 20), k1=st.sampled_from([0.0, 1.2, 5.0]), b=st.sampled_from([0.0, 0.75, 1.0]),
       sparse=st.booleans())  # fmt: skip
def test_scores_and_turns_are_those_of_the_formula(seed, k, k1, b, sparse):
    x, target = counts(seed, 20), counts(seed + 1, 3)
    expected = okapi(x, target, k1, b)
    held = csr_array(x) if sparse else x
    for combine, wanted in (("mean", expected.mean(1)), ("max", expected.max(1)), ("round_robin", expected.max(1))):
        made = Bm25(combine=combine, k1=k1, b=b).select(k, x=held, target=target)
        assert np.allclose(made.scores, wanted, rtol=1e-6)
        columns = [expected[:, j].astype(np.float32) for j in range(3)] if combine == "round_robin" else [made.scores]
        assert made.indices.tolist() == draft(columns, list(range(len(columns))), k)
    assert len(set(made.evidence["query"].tolist())) == min(k, 3)


@pytest.mark.parametrize("combine", ["round_robin", "mean", "max"])
def test_groups_take_turns_whatever_their_size(combine):
    x, target = counts(2, 40), counts(3, 5)
    names = ["b", "b", "a", "b", "b"]
    scores = okapi(x, target, 1.2, 0.75)
    made = Bm25(combine=combine).select(9, x=x, target=target, target_groups=names)
    if combine == "round_robin":
        columns, turns = [*scores.astype(np.float32).T], [2, 0, 2, 1, 2, 3, 2, 4]
    else:
        of = {"mean": np.mean, "max": np.max}[combine]
        columns = [of(scores[:, [2]], axis=1).astype(np.float32), of(scores[:, [0, 1, 3, 4]], axis=1).astype(np.float32)]
        turns = [0, 1]
        assert made.evidence["group"].tolist() == list("ababababa")
    assert made.indices.tolist() == draft(columns, turns, 9)


def test_a_rare_term_decides_and_a_longer_row_counts_less():
    x = np.zeros((30, 3))
    x[:, 0] = 1  # everywhere
    x[7, 1] = x[8, 1] = 1
    x[8, 2] = 20
    made = Bm25().select(30, x=x, target=np.array([[1.0, 1.0, 0.0]]))
    assert made.indices[:2].tolist() == [7, 8]
    assert made.scores[7] > 5 * made.scores[0] > 0


def test_zeros_that_are_stored_are_no_terms():
    x = counts(9, 30)
    stored = csr_array((x.ravel(), np.tile(np.arange(12), 30), np.arange(31) * 12), shape=x.shape)
    assert stored.nnz == 360 > np.count_nonzero(x)
    assert np.array_equal(*(Bm25().select(5, x=one, target=counts(10, 2)).scores for one in (x, stored)))


def test_mistakes_are_named():
    with pytest.raises(LlmselectError, match=r"target rows \[1\]"):
        Bm25().select(2, x=counts(0, 5), target=np.array([[1.0] * 12, [0.0] * 12]))
    for wrong in ({"k1": -1.0}, {"b": 1.5}):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            Bm25(**wrong)
