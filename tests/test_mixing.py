"""Limits on sources and targets: exact counts, the best rows within them, token budgets, and what cannot be met."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmselect import registry, selectors
from llmselect.errors import LlmselectError, UsageError
from llmselect.mixing import Limits, select_within
from llmselect.selection import Selection
from llmselect.selectors._base import inputs_of

many = settings(max_examples=80, deadline=None)
TOP = selectors.TopK()


def pool(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.permutation(n).astype(float), rng.choice(list("abc"), n, p=[0.6, 0.3, 0.1])


def counts(made, groups) -> Counter:
    return Counter(groups[made.indices].tolist())


def test_without_limits_it_is_the_selection():
    x, groups = pool(200)
    made = select_within(TOP, 30, Limits(), groups=groups, x=x)
    assert made.indices.tolist() == TOP.select(30, x=x).indices.tolist()


@many
@given(seed=st.integers(0, 10**6), k=st.integers(1, 9), cap=st.integers(1, 9), floor=st.integers(1, 3))
def test_caps_and_floors_give_the_best_subset(seed, k, cap, floor):
    """Against all subsets of a small pool, for an additive score."""
    x, groups = pool(12, seed)
    limits = Limits(caps={"a": cap + 1.0} if "a" in groups else {}, floors={"b": floor + 1.0} if "b" in groups else {})
    low = min(floor + 1, int((groups == "b").sum())) if "b" in groups else 0
    fits = lambda rows: (groups[rows] == "a").sum() <= cap + 1 and (groups[rows] == "b").sum() >= low  # noqa: E731
    subsets = [list(rows) for rows in itertools.combinations(range(12), k) if fits(list(rows))]
    if not subsets:
        with pytest.raises(UsageError, match="limits"):
            select_within(TOP, k, limits, groups=groups, x=x)
        return
    made = select_within(TOP, k, limits, groups=groups, x=x)
    assert len(made) == k and fits(made.indices)
    assert x[made.indices].sum() == max(x[rows].sum() for rows in subsets)
    assert (np.diff(x[made.indices]) < 0).all(), "rows stay in rank order"


def test_proportions_are_exact_and_each_source_gives_its_best():
    x, groups = pool(2000)
    made = select_within(TOP, 101, Limits(proportions={"a": 0.2, "c": 0.5}), groups=groups, x=x)
    assert counts(made, groups) == {"a": 20, "b": 30, "c": 51} or counts(made, groups) == {"a": 20, "b": 31, "c": 50}
    for source, count in counts(made, groups).items():
        rows = np.flatnonzero(groups == source)
        assert set(made.indices[groups[made.indices] == source]) == set(rows[np.argsort(-x[rows])[:count]])


def test_others_share_what_proportions_leave():
    x, groups = pool(2000)
    made = select_within(TOP, 100, Limits(proportions={"c": 0.4, "*": 0.6}), groups=groups, x=x)
    assert counts(made, groups)["c"] == 40
    others = np.flatnonzero(groups != "c")
    assert set(made.indices[groups[made.indices] != "c"]) == set(others[np.argsort(-x[others])[:60]])


def test_a_star_is_every_source_not_named():
    x, groups = pool(2000)
    found = counts(select_within(TOP, 100, Limits(caps={"*": 0.2, "c": 0.9}), groups=groups, x=x), groups)
    assert found["a"] == 20 and found["b"] == 20 and found["c"] == 60


@many
@given(seed=st.integers(0, 10**6), tokens=st.integers(40, 3000), cap=st.floats(0.1, 1))
def test_token_budgets_are_never_exceeded(seed, tokens, cap):
    x, groups = pool(300, seed)
    cost = np.random.default_rng(seed).integers(1, 40, 300)
    made = select_within(TOP, {"tokens": tokens}, Limits(caps={"a": cap}, floors={"c": 0.2}), groups=groups, x=x, cost=cost)
    spent = {g: int(cost[made.indices[groups[made.indices] == g]].sum()) for g in "abc"}
    assert sum(spent.values()) <= tokens and spent["a"] <= cap * tokens
    if cap == 1:
        assert sum(spent.values()) > min(tokens, int(cost.sum())) - 40 * 3
    assert spent["c"] > min(0.2 * tokens, int(cost[groups == "c"].sum())) - 40


@pytest.mark.parametrize("quotas,expected", [({"s": 0.25, "t": 0.75}, [10, 30]), ({"s": 0.5, "t": 0.5}, [20, 20])])
def test_quotas_are_what_each_target_picks(quotas, expected):
    rng = np.random.default_rng(0)
    x, target, tasks = rng.standard_normal((500, 6)), rng.standard_normal((5, 6)), np.array(list("ststt"))
    one = selectors.Similarity(combine="max")
    made = select_within(one, 40, Limits(quotas=quotas), groups=np.full(500, "z"), x=x, target=target, target_groups=tasks)
    assert [int((made.evidence["quota"] == t).sum()) for t in "st"] == expected
    for t in "st":
        alone = one.select(100, x=x, target=target[tasks == t]).indices.tolist()
        theirs = made.indices[made.evidence["quota"] == t].tolist()
        assert theirs == [row for row in alone if row not in set(made.indices) - set(theirs)][: len(theirs)]


def test_quotas_of_scores_by_target_group():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((300, 2))
    limits = Limits(quotas={"u": 1.0})
    made = select_within(TOP, 20, limits, groups=np.full(300, "z"), x=x, target_groups=np.array(["v", "u"]))
    assert made.indices.tolist() == np.argsort(-x[:, 1])[:20].tolist()


@pytest.mark.parametrize("name,options", [("km_random", {"clusters": 5}), ("kcenter", {}), ("balanced", {}), ("random", {})])
def test_any_selector_can_be_limited(name, options):
    x, groups = np.random.default_rng(0).standard_normal((400, 5)), pool(400)[1]
    selector = registry.selectors.get(name)(**options)
    inputs = {"x": x} if "x" in inputs_of(type(selector)) else {}
    made = select_within(selector, 60, Limits(caps={"a": 0.3}, floors={"c": 0.2}), groups=groups, seed=3, **inputs)
    assert len(made) == 60 and counts(made, groups)["a"] <= 18 and counts(made, groups)["c"] >= 12
    assert made.provenance["limits"]["caps"] == {"a": 0.3}
    assert all(len(one) == 60 for one in made.evidence.values())


@pytest.mark.parametrize(
    "options,told",
    [
        ({"caps": {"wiki": 0.5}}, r"limits\.caps\.wiki: no such source.*'a', 'b', 'c'"),
        ({"caps": {"a": -1}}, r"limits\.caps\.a: -1"),
        ({"floors": {"a": 2.5}}, r"limits\.floors\.a: 2\.5"),
        ({"floors": {"a": 0.7, "b": 0.7}}, "more than the budget"),
        ({"caps": {"*": 0.1}}, "they allow 15 rows of the 50"),
        ({"proportions": {"a": 0.7, "b": 0.7}}, "sum to 1.4"),
        ({"proportions": {"c": 0.99}}, "pool has"),
        ({"proportions": {"a": 0.5}, "caps": {"b": 0.1}}, "without caps"),
        ({"quotas": {"math": 0.5}}, r"limits\.quotas\.math: no such target group"),
    ],
)
def test_mistakes_are_named(options, told):
    x, groups = pool(200)
    with pytest.raises(UsageError, match=told):
        select_within(TOP, 50, Limits(**options), groups=groups, x=x)


def test_excluded_rows_are_never_taken():
    x, groups = pool(200)
    gone = np.argsort(-x)[:20]
    made = select_within(TOP, 30, Limits(caps={"a": 0.5}), groups=groups, x=x, exclude=gone)
    assert not set(made.indices) & set(gone.tolist()) and len(made) == 30
    plain = TOP.select(30, x=x, exclude=gone)
    assert plain.indices.tolist() == np.argsort(-x)[20:50].tolist() and plain.provenance["excluded"] == 20
    with pytest.raises(UsageError, match="exclude"):
        TOP.select(3, x=x, exclude=[200])


@many
@given(weights=st.lists(st.floats(0.01, 10), min_size=1, max_size=20), total=st.integers(1, 60))
def test_weights_become_whole_repetitions(weights, total):
    made = Selection(np.arange(len(weights)), 50, weights=np.array(weights))
    counts, quota = made.repetitions(total), total * np.array(weights) / sum(weights)
    assert counts.sum() == total and (np.abs(counts - quota) < 1).all()
    assert Selection(np.arange(7), 50).repetitions().tolist() == [1] * 7


def test_a_dataset_of_repetitions():
    from datasets import Dataset

    pool = Dataset.from_dict({"v": list(range(6))})
    made = Selection(np.array([4, 1, 3]), 6, weights=np.array([0.6, 0.0, 0.4]))
    assert made.to_dataset(pool, repeat=True)["v"][:] == [4, 4, 3]
    with pytest.raises(LlmselectError, match="weights"):
        Selection(np.array([4]), 6, weights=np.array([np.nan])).repetitions()
