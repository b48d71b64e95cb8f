"""IDEAL against its graph built by hand and cascades run edge by edge."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.sparse import csc_array, csr_array

from llmselect.errors import UsageError
from llmselect.kernels.cascade import cascade_seeds
from llmselect.kernels.graph import Into
from llmselect.kernels.keyed import Keyed
from llmselect.kernels.rows import Rows
from llmselect.selectors.ideal import Ideal

pytest.importorskip("faiss")


def clusters(seed: int, n: int = 300) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((12, 6))[rng.integers(0, 12, n)] + 0.3 * rng.standard_normal((n, 6))


def chances(x: np.ndarray, k: int) -> np.ndarray:
    """p_vu of every pair, from the sorted cosines of each row."""
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    out = np.zeros((len(x), len(x)))
    for v in range(len(x)):
        cosine = unit @ unit[v]
        near = sorted((u for u in range(len(x)) if u != v), key=lambda u: -cosine[u])[:k]
        for u in near:
            out[v, u] = max(0.0, cosine[u])
        out[v] /= out[v].sum() or 1
    return out


def edges(p: np.ndarray) -> Into:
    found = csr_array(p).tocsc()
    return Into(found.indptr.astype(np.int64), found.indices.astype(np.int32), found.data)


def dense(edges: Into) -> np.ndarray:
    n = len(edges.start) - 1
    return csc_array((edges.chance, edges.source, edges.start), shape=(n, n)).toarray()


def reached(p: np.ndarray, seeds: list[int], runs: int, seed: int = 0) -> float:
    """Mean number of rows reached in simulated cascades."""
    rng, total = np.random.default_rng(seed), 0
    for _ in range(runs):
        on, frontier = set(seeds), list(seeds)
        while frontier:
            v = frontier.pop()
            new = [u for u in np.flatnonzero(p[v]) if u not in on and rng.random() < p[v, u]]
            on.update(new)
            frontier += new
        total += len(on)
    return total / runs


@pytest.mark.parametrize("k", [1, 5, 10])
def test_the_graph_is_that_of_the_formula(k):
    x = clusters(0, 60)
    assert np.allclose(dense(Ideal(neighbours=k)._edges(Rows(x))), chances(x, k), atol=1e-6)


def test_rows_that_point_apart_have_no_edges():
    x = np.array([[1.0, 0], [-1, 0], [0, 1], [0, -1]])
    made = Ideal().select(4, x=x)
    assert len(Ideal()._edges(Rows(x)).source) == 0
    assert made.indices.tolist() == [0, 1, 2, 3]
    assert made.evidence["gain"].tolist() == [1, 1, 1, 1]


def test_rows_are_the_seeds_of_the_cascade_and_their_gains_the_rows_reached():
    x = clusters(1)
    p = chances(x, 10)
    made = Ideal(rounds=200).select(20, x=x, seed=3)
    order, gains = cascade_seeds(edges(p), 20, Keyed(3, np.arange(300, dtype=np.uint64)), 200)
    assert made.indices.tolist() == order.tolist()
    assert np.allclose(made.evidence["gain"], gains)
    for k in (1, 5, 20):
        assert gains[:k].sum() == pytest.approx(reached(p, order[:k].tolist(), 1500), rel=0.1)


def test_it_reaches_more_than_chance():
    x = clusters(2)
    p, rng = chances(x, 10), np.random.default_rng(0)
    made = reached(p, Ideal(rounds=100).select(15, x=x).indices.tolist(), 300)
    assert made > 1.1 * max(reached(p, rng.permutation(300)[:15].tolist(), 300) for _ in range(8))


@pytest.mark.parametrize("wrong", [{"neighbours": 0}, {"rounds": 0}])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(UsageError, match=next(iter(wrong))):
        Ideal(**wrong)
