"""Cascade seeds against the exact spread: every way in which the edges of a small graph can carry."""

from __future__ import annotations

import itertools
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array

from llmselect.errors import LlmselectError
from llmselect.kernels import cascade
from llmselect.kernels.cascade import cascade_seeds
from llmselect.kernels.graph import Into
from llmselect.kernels.keyed import Keyed

SEEDS = st.integers(0, 2**32 - 1)


def small_graph(seed: int, n: int = 6, edges: int = 9) -> dict[tuple[int, int], float]:
    rng = np.random.default_rng(seed)
    pairs = [(v, u) for v in range(n) for u in range(n) if v != u]
    return {pairs[i]: float(rng.uniform(0.1, 0.9)) for i in rng.permutation(len(pairs))[:edges]}


def matrix(graph: dict[tuple[int, int], float], n: int = 6) -> csr_array:
    made = np.zeros((n, n))
    for (v, u), p in graph.items():
        made[v, u] = p
    return csr_array(made)


def spread(graph: dict[tuple[int, int], float], seeds: list[int]) -> float:
    """Expected rows reached, over all 2^edges outcomes."""
    total = 0.0
    for carries in itertools.product([False, True], repeat=len(graph)):
        chance = np.prod([p if c else 1 - p for c, p in zip(carries, graph.values(), strict=True)])
        reached, frontier = set(seeds), list(seeds)
        while frontier:
            v = frontier.pop()
            new = {u for (w, u), c in zip(graph, carries, strict=True) if c and w == v} - reached
            reached |= new
            frontier += new
        total += chance * len(reached)
    return total


def edges(p: csr_array) -> Into:
    into = csr_array(p).tocsc()
    return Into(into.indptr.astype(np.int64), into.indices.astype(np.int32), into.data)


def keyed(n: int, seed: int = 0) -> Keyed:
    return Keyed(seed, np.random.default_rng(5).integers(0, 2**63, n).astype(np.uint64))


@pytest.mark.parametrize("seed", range(4))
def test_gains_add_up_to_the_exact_spread_and_the_seeds_are_nearly_the_best(seed):
    graph = small_graph(seed)
    order, gains = cascade_seeds(edges(matrix(graph)), 6, keyed(6), rounds=40_000)
    exact = [spread(graph, order[:k].tolist()) for k in range(1, 7)]
    assert np.allclose(np.cumsum(gains), exact, atol=0.03)
    for k in (1, 2, 3):
        best = max(spread(graph, list(seeds)) for seeds in itertools.combinations(range(6), k))
        assert exact[k - 1] >= (best - 0.03 if k == 1 else (1 - 1 / np.e) * best)


@settings(max_examples=60)
@given(seed=SEEDS, n=st.integers(1, 25), rounds=st.integers(1, 4), together=st.sampled_from([1, 30, 1 << 20]))
def test_the_order_is_the_full_greedy_over_the_sets(seed, n, rounds, together):
    rng = np.random.default_rng(seed)
    p = rng.random((n, n)) * (rng.random((n, n)) < 0.2)
    source = keyed(n, seed)
    with mock.patch.object(cascade, "TOGETHER", together):
        cover = cascade._Cover(edges(p), source, n * rounds)
        order, gains = cascade_seeds(edges(p), n, source, rounds)
    holding = [[i for start, found in cover.parts for i in found[start[row] : start[row + 1]].tolist()] for row in range(n)]
    sets = [{row for row in range(n) if i in holding[row]} for i in range(n * rounds)]
    assert sum(map(len, holding)) == sum(map(len, sets)) == cover.new.sum()
    assert len(cover.parts) == n * rounds if together == 1 else len(cover.parts) <= 1 + cover.new.sum() // together
    assert all(i % n in one for i, one in enumerate(sets))
    taken: list[int] = []
    for _ in range(n):
        left = [one for one in sets if not one & set(taken)]
        free = [i for i in range(n) if i not in taken]
        taken.append(min(free, key=lambda i: (-sum(i in one for one in left), int(source.keys[i]))))
    assert order.tolist() == taken
    assert gains.sum() == pytest.approx(n)
    assert cascade_seeds(edges(p), n // 2 + 1, source, rounds)[0].tolist() == taken[: n // 2 + 1]


def test_the_order_of_rows_does_not_matter():
    rng = np.random.default_rng(1)
    p, moved, source = rng.random((50, 50)) * (rng.random((50, 50)) < 0.08), rng.permutation(50), keyed(50)
    order, gains = cascade_seeds(edges(p), 20, source)
    other, same = cascade_seeds(edges(p[np.ix_(moved, moved)]), 20, Keyed(0, source.keys[moved]))
    assert moved[other].tolist() == order.tolist()
    assert np.array_equal(gains, same)
    assert cascade_seeds(edges(p), 20, keyed(50, seed=9))[1].tolist() != gains.tolist()


def test_an_edge_carries_as_often_as_it_should_and_rounds_are_independent():
    n = 4000
    p = csr_array((np.full(n // 2, 0.3), (np.arange(0, n, 2), np.arange(1, n, 2))), shape=(n, n))
    gains = cascade_seeds(edges(p), n // 2, keyed(n), rounds=8)[1]  # each seed is worth 1 + (rounds that carried) / 8
    times = np.bincount(np.round(8 * (gains - 1)).astype(int), minlength=9) / (n // 2)
    expected = [0.0576, 0.1977, 0.2965, 0.2541, 0.1361, 0.0467, 0.0100, 0.0012, 0.0001]  # binomial (8, 0.3)
    assert np.allclose(times[1:], expected[1:], atol=0.035)
    assert gains.mean() == pytest.approx(1.3, abs=0.02)


def test_no_probabilities_are_refused():
    for wrong in (1.5, -0.1, np.nan):
        with pytest.raises(LlmselectError, match="probabilities"):
            cascade_seeds(edges(np.array([[0, wrong], [0, 0]])), 1, keyed(2))
