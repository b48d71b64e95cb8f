"""k-means, neighbours, greedy maximisation and semantic duplicates against dense versions, scikit-learn and FAISS."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmselect import selectors
from llmselect.errors import LlmselectError, UsageError
from llmselect.kernels import objectives
from llmselect.kernels.greedy import maximize
from llmselect.kernels.groups import apportion
from llmselect.kernels.keyed import Keyed
from llmselect.kernels.kmeans import kmeans, silhouettes
from llmselect.kernels.neighbours import neighbours
from llmselect.kernels.rows import Rows
from llmselect.semdedup import semantic_duplicates

many = settings(max_examples=60, deadline=None)


def blobs(per: int, centers: int, d: int = 8, seed: int = 0, spread: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    middle = 3 * rng.standard_normal((centers, d))
    label = np.repeat(np.arange(centers), per)
    return middle[label] + spread * rng.standard_normal((len(label), d)), label


def keyed(n: int, seed: int = 0) -> Keyed:
    return Keyed(seed, np.random.default_rng(99).permutation(n).astype(np.uint64))


# k-means


def test_kmeans_finds_what_is_there_and_assigns_to_the_nearest():
    x, label = blobs(100, 5)
    made = kmeans(Rows(x, normalize=False), 5, keyed(500))
    assert sorted(made.sizes.tolist()) == [100] * 5
    assert all(len(set(made.label[label == c].tolist())) == 1 for c in range(5))
    dense = ((x[:, None] - made.centroids) ** 2).sum(-1)
    assert (made.label == dense.argmin(1)).all()
    assert np.allclose(made.distance, dense.min(1), rtol=1e-4)


def test_kmeans_is_as_good_as_scikit_learns():
    from sklearn.cluster import KMeans

    x = np.random.default_rng(0).standard_normal((3000, 12))
    made = kmeans(Rows(x, normalize=False), 30, keyed(3000))
    theirs = KMeans(30, n_init=1, max_iter=25, random_state=0).fit(x)
    assert float(made.distance.sum()) < 1.02 * theirs.inertia_


def test_a_seed_repeats_and_the_order_of_the_pool_does_not_matter():
    x, rng = np.random.default_rng(0).standard_normal((2000, 6)), keyed(2000)
    order = np.random.default_rng(1).permutation(2000)
    a, b = kmeans(Rows(x), 20, rng, per_centroid=40), kmeans(Rows(x), 20, rng, per_centroid=40)
    moved = kmeans(Rows(x[order]), 20, Keyed(0, rng.keys[order]), per_centroid=40)
    other = kmeans(Rows(x), 20, Keyed(1, rng.keys), per_centroid=40)
    assert (a.label == b.label).all() and (a.label[order] == moved.label).all()
    assert (a.label != other.label).any()


def test_silhouette_finds_the_number_of_clusters_and_is_scikit_learns():
    from sklearn.metrics import silhouette_score

    x, label = blobs(60, 8)
    found = silhouettes(Rows(x, normalize=False), [2, 4, 8, 16], keyed(480))
    assert max(found, key=found.__getitem__) == 8
    assert found[8] == pytest.approx(silhouette_score(x, label), abs=1e-6)


def test_too_few_rows_are_told(caplog):
    x = np.random.default_rng(0).standard_normal((100, 4))
    with caplog.at_level(logging.WARNING):
        kmeans(Rows(x), 10, keyed(100))
    assert "100 rows for 10 clusters" in caplog.text
    with pytest.raises(UsageError, match="between 1 and the 100 rows"):
        kmeans(Rows(x), 101, keyed(100))


@many
@given(k=st.integers(0, 300), sizes=st.lists(st.integers(1, 60), min_size=1, max_size=8), data=st.data())
def test_apportion_is_exact_capped_and_within_one_row(k, sizes, data):
    weights = data.draw(st.lists(st.floats(0, 10), min_size=len(sizes), max_size=len(sizes)))
    shares = apportion(k, weights, sizes)
    assert shares.sum() == min(k, sum(sizes)) and (shares >= 0).all() and (shares <= sizes).all()
    proportional = apportion(k, sizes, sizes)
    if k <= sum(sizes):
        quota = k * np.array(sizes) / sum(sizes)
        assert (np.abs(proportional - quota) < 1 + 1e-9).all()
        more = proportional > quota + 1e-9  # those whose remainder was given out: the largest
        assert (quota % 1)[more].min(initial=1) >= (quota % 1)[~more & (quota % 1 < 1 - 1e-9)].max(initial=0) - 1e-9


def test_kmq_prefers_quality_within_clusters_of_proportional_budgets():
    x, label = blobs(100, 4, spread=0.01)
    x, label = x[:350], label[:350]  # the last cluster is half as large
    quality = np.random.default_rng(0).standard_normal(350)
    cold = selectors.Kmq(clusters=4, temperature=1e-6).select(70, x=x, quality=quality)
    for c, budget in enumerate([20, 20, 20, 10]):
        rows = np.flatnonzero(label == c)
        assert set(cold.indices[label[cold.indices] == c]) == set(rows[np.argsort(-quality[rows])[:budget]])
    warm = selectors.Kmq(clusters=4).select(70, x=x, quality=quality)
    assert quality.mean() < quality[warm.indices].mean() < quality[cold.indices].mean()
    assert warm.provenance["report"]["budgets"] == cold.provenance["report"]["budgets"]


def test_gumbel_draws_are_those_of_the_softmax():
    quality, x = np.array([0.0, 1.0, 2.0, 3.0]), np.ones((4, 2)) + 0.01 * np.random.default_rng(0).standard_normal((4, 2))
    picks = [selectors.Kmq(clusters=1).select(1, x=x, quality=quality, seed=s).indices[0] for s in range(1500)]
    p = np.exp((quality - quality.mean()) / quality.std())
    assert np.abs(np.bincount(picks, minlength=4) / 1500 - p / p.sum()).max() < 0.04


def test_km_closest_takes_the_rows_next_to_the_centroid():
    x, label = blobs(50, 3, spread=0.2)
    made = selectors.KmClosest(clusters=3, unit=False).select(15, x=x)
    for c in range(3):
        rows = np.flatnonzero(label == c)
        distance = ((x[rows] - x[rows].mean(0)) ** 2).sum(1)
        assert set(made.indices[label[made.indices] == c]) == set(rows[np.argsort(distance)[:5]])


# Neighbours


@pytest.mark.parametrize("exact_below", [10_000, 100])
def test_neighbours_are_the_dense_ones(exact_below):
    x, _ = blobs(200, 10, d=16, spread=1.0)
    near, cosine = neighbours(Rows(x), 5, exact_below)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    dense = unit @ unit.T
    np.fill_diagonal(dense, -9)
    expected = np.argsort(-dense, axis=1)[:, :5]
    recall = np.mean([len(set(a) & set(b)) / 5 for a, b in zip(near.tolist(), expected.tolist(), strict=True)])
    assert recall == 1 if exact_below > 2000 else recall > 0.95
    assert np.abs(cosine - np.take_along_axis(dense, near.astype(np.int64), 1)).max() < 2e-3
    assert (near != np.arange(2000)[:, None]).all()


def test_equal_rows_are_neighbours_and_never_their_own():
    near, cosine = neighbours(Rows(np.ones((7, 3))), 4)
    assert (near != np.arange(7)[:, None]).all() and (near >= 0).all() and np.allclose(cosine, 1)
    assert neighbours(Rows(np.ones((1, 3))), 4)[0].shape == (1, 0)


# Set functions


def unit_rows(n: int, d: int = 6, seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((n, d))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def coverage(x: np.ndarray) -> objectives.Coverage:
    return objectives.Coverage(*neighbours(Rows(x), len(x)))


def value(kind: str, x: np.ndarray, rows: list[int]) -> float:
    """The set function from its formula, dense."""
    if not rows:
        return 0.0
    cosine, inside = x @ x.T, x[rows] @ x[rows].T
    if kind == "facility":
        return float(np.maximum(cosine, 0)[:, rows].max(1).sum())
    if kind == "cut":
        return float(((1 + cosine) / 2)[:, rows].sum() - 0.5 * ((1 + inside) / 2).sum())
    return float(np.linalg.slogdet(np.eye(len(rows)) + 10 * inside)[1])


MADE = {"facility": coverage, "cut": lambda x: objectives.GraphCut(Rows(x), 0.5), "det": lambda x: objectives.LogDet(Rows(x), 10)}


@pytest.mark.parametrize("kind", MADE)
def test_gains_are_those_of_the_formula(kind):
    x = unit_rows(40)
    made, taken, rng = MADE[kind](x), [], np.random.default_rng(0)
    assert (made.bounds() >= made.gains(np.arange(40)) - 1e-9).all()
    for row in rng.permutation(40)[:12].tolist():
        expected = [value(kind, x, [*taken, i]) - value(kind, x, taken) for i in range(40)]
        assert np.allclose(np.delete(made.gains(np.arange(40)), taken), np.delete(expected, taken), atol=2e-4)
        made.add(row)
        taken.append(row)


@many
@given(kind=st.sampled_from([*MADE, "center"]), seed=st.integers(0, 10**6), n=st.integers(1, 50), copies=st.booleans())
def test_lazy_is_naive_greedy(kind, seed, n, copies):
    x = unit_rows(n, seed=seed)
    x = x[np.random.default_rng(seed).integers(0, n, n)] if copies else x
    make = MADE.get(kind, lambda x: objectives.Spread(Rows(x)))
    naive, lazy = (maximize(make(x), n, keyed(n), how) for how in ("naive", "lazy"))
    assert lazy.order.tolist() == naive.order.tolist()
    assert lazy.gains.tolist() == naive.gains.tolist()
    assert lazy.evaluations <= naive.evaluations


@many
@given(kind=st.sampled_from(list(MADE)), seed=st.integers(0, 10**6), d=st.integers(1, 12))
def test_gains_asked_for_now_and_then_are_those_of_the_formula(kind, seed, d):
    x, rng, taken = unit_rows(30, d, seed), np.random.default_rng(seed), []
    made = MADE[kind](x)
    for row in rng.permutation(30)[:14].tolist():
        some = np.flatnonzero(rng.random(30) < 0.2)
        expected = [value(kind, x, [*taken, i]) - value(kind, x, taken) for i in some]
        new = ~np.isin(some, taken)
        assert np.allclose(made.gains(some)[new], np.array(expected)[new], atol=2e-4)
        made.add(row)
        taken.append(row)


def test_lazy_looks_at_few_rows():
    x = unit_rows(2000, d=12)
    found = maximize(coverage(x), 100, keyed(2000))
    assert found.evaluations < 2000 * 100 / 5  # directions drawn at random are the hardest case


def test_k_center_is_the_farthest_point():
    x = unit_rows(60)
    order = selectors.KCenter().select(20, x=x).indices.tolist()
    assert order[0] == int((x @ x.mean(0)).argmax())
    for i in range(1, 20):
        distance = (2 - 2 * x @ x[order[:i]].T).min(1)
        assert order[i] == int(distance.argmax())


def test_stochastic_greedy_is_nearly_as_good_and_random():
    x = unit_rows(600, d=10)
    best = maximize(coverage(x), 30, keyed(600)).gains.sum()
    found = [maximize(coverage(x), 30, keyed(600, seed), "stochastic", 0.05) for seed in (0, 1)]
    assert found[0].order.tolist() != found[1].order.tolist()
    assert all(0.95 * best < one.gains.sum() <= best for one in found)
    assert found[0].evaluations == 30 * int(np.ceil(600 / 30 * np.log(20)))


@many
@given(seed=st.integers(0, 10**6), n=st.integers(1, 40), copies=st.booleans(), epsilon=st.sampled_from([0.9, 0.3, 1e-30]))
def test_stochastic_greedy_takes_each_row_once_whatever_the_order_of_the_pool(seed, n, copies, epsilon):
    rng = np.random.default_rng(seed)
    x, k, moved = unit_rows(n, seed=seed), int(rng.integers(1, n + 1)), rng.permutation(n)
    x = x[rng.integers(0, n, n)] if copies else x
    one = maximize(objectives.GraphCut(Rows(x), 0.5), k, keyed(n), "stochastic", epsilon)
    other = maximize(objectives.GraphCut(Rows(x[moved]), 0.5), k, Keyed(0, keyed(n).keys[moved]), "stochastic", epsilon)
    assert len(set(one.order.tolist())) == k
    assert moved[other.order].tolist() == one.order.tolist()
    taken = one.order.tolist()
    assert np.allclose(one.gains, [value("cut", x, taken[: i + 1]) - value("cut", x, taken[:i]) for i in range(k)], atol=2e-4)
    if epsilon == 1e-30:
        assert taken == maximize(objectives.GraphCut(Rows(x), 0.5), k, keyed(n), "lazy").order.tolist()


def test_few_neighbours_lose_little_of_the_dense_value():
    x, _ = blobs(40, 25, d=16, spread=0.8)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    dense = maximize(coverage(x), 50, keyed(1000)).order.tolist()
    sparse = selectors.FacilityLocation(neighbours=32).select(50, x=x).indices.tolist()
    assert value("facility", x, sparse) > 0.98 * value("facility", x, dense)


# Semantic duplicates


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(2, 120), clusters=st.integers(1, 3), ranked=st.booleans())
def test_what_stays_is_far_apart_and_what_goes_has_a_near_one(seed, n, clusters, ranked):
    rng = np.random.default_rng(seed)
    x = unit_rows(max(2, n // 3), seed=seed)[rng.integers(0, max(2, n // 3), n)] + 0.1 * rng.standard_normal((n, 6))
    quality = rng.permutation(n).astype(float) if ranked else None
    found = semantic_duplicates(x, 0.9, clusters=min(clusters, n), quality=quality, seed=seed)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    cosine, stays = unit @ unit.T, np.delete(np.arange(n), found.dropped)
    assert np.allclose(cosine[found.dropped, found.nearest], found.cosine, atol=1e-6)
    assert (found.cosine > 0.9 - 1e-6).all() and set(found.nearest) <= set(stays)
    if clusters == 1:
        inside = cosine[np.ix_(stays, stays)] - 2 * np.eye(len(stays))
        assert inside.max() <= 0.9 + 1e-6
        assert np.allclose(found.cosine, cosine[np.ix_(found.dropped, stays)].max(1, initial=-1), atol=1e-6)
        if quality is not None:  # the greedy rule: best first
            kept: list[int] = []
            for row in np.argsort(-quality).tolist():
                if not kept or cosine[row, kept].max() <= 0.9:
                    kept.append(row)
            assert sorted(kept) == stays.tolist()


def test_blocks_of_one_cluster_see_each_other(monkeypatch):
    from llmselect import semdedup

    x = np.repeat(unit_rows(30, d=20), 5, axis=0)
    whole = semantic_duplicates(x, 0.99, clusters=1)
    monkeypatch.setattr(semdedup, "BLOCK", 7)
    parts = semantic_duplicates(x, 0.99, clusters=1)
    assert len(whole) == 120 and (whole.dropped == parts.dropped).all() and (whole.cosine > 0.999).all()
    assert (whole.dropped // 5 == whole.nearest // 5).all()


def test_a_threshold_or_a_row_that_makes_no_sense():
    with pytest.raises(UsageError, match=r"threshold: 1\.5"):
        semantic_duplicates(np.ones((3, 2)), 1.5)
    with pytest.raises(LlmselectError, match=r"rows \[1\]"):
        semantic_duplicates(np.array([[1.0, 2], [np.nan, 1], [2, 2]]))
