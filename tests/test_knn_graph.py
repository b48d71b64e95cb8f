"""Graphs of neighbours, undirected and turned round, against sets of pairs."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmselect.kernels import graph as graphs
from llmselect.kernels.graph import into, undirected
from llmselect.kernels.objectives import Coverage
from llmselect.registry import selectors
from llmselect.selectors._base import inputs_of


@st.composite
def found(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """What `neighbours` may give: different others, best first, -1 with cosine 0 at the end where there are fewer."""
    n, k = draw(st.integers(2, 30)), draw(st.integers(1, 8))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    pairs = rng.uniform(-1, 1.01, (n, n)).astype(np.float32)
    pairs = np.triu(pairs, 1) + np.triu(pairs, 1).T
    near, cosine = np.full((n, k), -1, np.int32), np.zeros((n, k), np.float32)
    for i in range(n):
        some = rng.permutation(np.delete(np.arange(n), i))[: rng.integers(0, k + 1)]
        some = some[np.argsort(-pairs[i, some])]
        near[i, : len(some)], cosine[i, : len(some)] = some, pairs[i, some]
    return near, cosine


@settings(max_examples=200)
@given(made=found(), above=st.sampled_from([-np.inf, 0.0, 0.5]), together=st.sampled_from([1, 7, 1 << 26]))
def test_rows_of_either_side_are_neighbours_once(made, above, together):
    near, cosine = made
    with mock.patch.object(graphs, "TOGETHER", together):
        graph = undirected(near, cosine, above)
    pairs = {
        pair: min(float(cosine[i, p]), 1.0)
        for i in range(len(near))
        for p, j in enumerate(near[i].tolist())
        if j >= 0 and cosine[i, p] > above
        for pair in ((i, j), (j, i))
    }
    told = [(i, int(j), float(c)) for i in range(len(near)) for j, c in zip(*graph[i], strict=True)]
    assert len(told) == len(pairs) == graph.start[-1]
    assert {(i, j): c for i, j, c in told} == pairs
    own = [[j for p, j in enumerate(row.tolist()) if j >= 0 and cosine[i, p] > above] for i, row in enumerate(near)]
    assert all(graph[i][0][: len(own[i])].tolist() == own[i] for i in range(len(near)))


def test_directions_that_rounding_tells_apart_are_one_edge():
    near = np.array([[1], [0], [1]], np.int32)
    graph = undirected(near, np.array([[1e-9], [-1e-9], [0.5]], np.float32), above=0)
    assert [graph[i][0].tolist() for i in range(3)] == [[1], [0, 2], [1]]
    assert [graph[i][1].tolist() for i in range(3)] == [[pytest.approx(1e-9)], [pytest.approx(1e-9), 0.5], [0.5]]


@settings(max_examples=100)
@given(made=found(), together=st.sampled_from([1, 7, 1 << 26]))
def test_edges_turned_round_lead_where_they_led(made, together):
    near, chance = made[0], np.maximum(made[1], 0)
    with mock.patch.object(graphs, "TOGETHER", together):
        turned = into(near, chance)
    told = [(int(v), u, c) for u in range(len(near)) for v, c in arrivals(turned, u)]
    ways = {(v, int(near[v, p]), float(c)) for v, row in enumerate(chance) for p, c in enumerate(row) if c > 0}
    assert len(told) == len(ways) == turned.start[-1]
    assert set(told) == ways
    assert all(np.all(np.diff(turned.source[a:b]) > 0) for a, b in zip(turned.start, turned.start[1:], strict=False))


def arrivals(turned: graphs.Into, row: int) -> list[tuple[int, float]]:
    here = slice(turned.start[row], turned.start[row + 1])
    return list(zip(turned.source[here].tolist(), turned.chance[here].tolist(), strict=True))


@settings(max_examples=50)
@given(made=found(), seed=st.integers(0, 10**6))
def test_coverage_is_the_sum_of_the_best(made, seed):
    near, cosine = made
    n, rng = len(near), np.random.default_rng(seed)
    dense = np.eye(n)
    for i, p in zip(*np.nonzero(near >= 0), strict=True):
        dense[i, near[i, p]] = dense[near[i, p], i] = min(max(float(cosine[i, p]), 0.0), 1.0)
    coverage, taken = Coverage(near, cosine), list[int]()
    np.testing.assert_allclose(coverage.bounds(), dense.sum(1))
    for row in rng.permutation(n).tolist():
        best = dense[:, taken].max(1, initial=0)
        expected = np.maximum(dense, best[:, None]).sum(0) - best.sum()
        np.testing.assert_allclose(coverage.gains(np.arange(n)), expected, atol=1e-9)
        coverage.add(row)
        taken.append(row)


def test_graphs_in_files_are_those_from_memory(monkeypatch):
    rng = np.random.default_rng(0)
    near = np.array([rng.permutation(np.delete(np.arange(200), i))[:9] for i in range(200)], np.int32)
    cosine = rng.uniform(-1, 1, near.shape).astype(np.float32)
    held = undirected(near, cosine)
    monkeypatch.setattr("llmselect.kernels.room.HELD", 1)
    monkeypatch.setattr("llmselect.kernels.graph.TOGETHER", 50)
    filed = undirected(near, cosine)
    assert all(np.array_equal(getattr(held, one), getattr(filed, one)) for one in ("start", "other", "cosine"))


@pytest.mark.parametrize("name", ["facility_location", "qdit", "d2", "ideal"])
def test_among_equal_rows_ids_decide_which_are_neighbours(name):
    pytest.importorskip("faiss")
    rng = np.random.default_rng(4)
    x, quality = np.repeat(rng.standard_normal((4, 5)), 30, axis=0), np.arange(120.0) % 7  # more copies than neighbours
    ids, moved, one = [f"r{i}" for i in range(120)], rng.permutation(120), selectors.get(name)(neighbours=5)
    scored = {"quality"} & set(inputs_of(type(one)))
    made = one.select(30, x=x, ids=ids, **dict.fromkeys(scored, quality))
    other = one.select(30, x=x[moved], ids=[ids[i] for i in moved], **dict.fromkeys(scored, quality[moved]))
    assert list(other.ids) == list(made.ids)
