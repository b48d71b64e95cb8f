"""Whitening, optimal transport and TAROT against POT, NumPy and brute force."""

from __future__ import annotations

import numpy as np
import ot
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmselect import selectors
from llmselect.errors import LlmselectError, UsageError
from llmselect.kernels.keyed import keys_of
from llmselect.kernels.rows import Rows
from llmselect.kernels.transport import entropic, exact
from llmselect.kernels.whitening import Whitened, Whitening

few = settings(max_examples=25, deadline=None)


def skewed(n: int, d: int, seed: int = 0) -> np.ndarray:
    """Rows of a Gaussian whose variances span four orders of magnitude, away from the origin."""
    rng = np.random.default_rng(seed)
    mix = np.linalg.qr(rng.standard_normal((d, d)))[0] * np.geomspace(1, 1e-2, d)
    return rng.standard_normal((n, d)) @ mix.T + 3


@pytest.mark.parametrize("kind", ["cholesky", "zca"])
def test_whitened_rows_have_covariance_one(kind):
    x, target = skewed(20_000, 12), skewed(40, 12, seed=1)
    made = Whitening.fit(Rows(x, normalize=False), Rows(target, normalize=False), ridge=1e-7, kind=kind)
    both = np.concatenate([made(x), made(target)])
    assert np.abs(both.mean(0)).max() < 1e-8
    assert np.abs(np.cov(both.T, bias=True) - np.eye(12)).max() < 1e-2
    assert np.linalg.cond(np.cov(x.T)) > 5e3
    if kind == "zca":
        assert np.allclose(made.factor, made.factor.T)


def test_cholesky_and_zca_give_the_same_cosines():
    x, target = skewed(500, 8), skewed(6, 8, seed=1)
    found = []
    for kind in ("cholesky", "zca"):
        made = Whitening.fit(Rows(x, normalize=False), Rows(target, normalize=False), kind=kind)
        found.append(Whitened(Rows(x, normalize=False), made)[:] @ Whitened(Rows(target, normalize=False), made)[:].T)
    assert np.allclose(*found, atol=1e-8)


def test_small_features_are_not_drowned_by_the_ridge():
    x = skewed(500, 8) * 1e-6
    same = [Whitening.fit(Rows(s * x, normalize=False), Rows(s * x[:5], normalize=False))(s * x) for s in (1, 1e6)]
    assert np.allclose(*same, rtol=1e-6)


def test_equal_rows_cannot_be_whitened():
    rows = Rows(np.ones((9, 3)), normalize=False)
    with pytest.raises(LlmselectError, match="are equal"):
        Whitening.fit(rows, rows)


@few
@given(seed=st.integers(0, 10**6), a=st.integers(2, 30), b=st.integers(2, 30))
def test_exact_transport_is_pots_and_feasible(seed, a, b):
    cost = np.random.default_rng(seed).random((a, b))
    made = exact(cost)
    assert made.value == pytest.approx(ot.emd2(np.full(a, 1 / a), np.full(b, 1 / b), cost), rel=1e-9)
    assert (made.source[:, None] + made.target <= cost + 1e-9).all()
    assert made.source.mean() + made.target.mean() == pytest.approx(made.value)
    noise = np.random.default_rng(seed + 1)
    warm = exact(cost, (made.source + 0.1 * noise.random(a), made.target + 0.1 * noise.random(b)))
    assert warm.value == pytest.approx(made.value, rel=1e-9)


def test_sinkhorn_tends_to_the_exact_cost():
    rng = np.random.default_rng(0)
    cost = np.sqrt(2 - 2 * np.clip(rng.normal(0, 0.3, (50, 50)), -1, 1))
    off = [entropic(cost, epsilon).value / exact(cost).value - 1 for epsilon in (0.1, 0.02, 0.001)]
    assert off[0] > off[1] > off[2] > -1e-6
    assert off[2] < 0.01


@few
@given(seed=st.integers(0, 10**6), a=st.integers(2, 25), b=st.integers(2, 25), epsilon=st.sampled_from([0.3, 0.1, 0.05]))
def test_potentials_are_pots(seed, a, b, epsilon):
    cost = np.random.default_rng(seed).random((a, b)) + 0.5
    made, scale = entropic(cost, epsilon, tolerance=1e-10), epsilon * cost.mean()
    plan, log = ot.bregman.sinkhorn_log(
        np.full(a, 1 / a), np.full(b, 1 / b), cost, scale, numItermax=50_000, stopThr=1e-12, log=True
    )
    theirs = scale * log["log_u"]
    assert np.abs(made.source - (theirs - theirs.mean())).max() < 1e-5
    assert made.value == pytest.approx((plan * cost).sum(), rel=1e-5)


# TAROT


def naive_layers(x: np.ndarray, target: np.ndarray, ridge: float, keys: np.ndarray) -> list[set[int]]:
    both = np.concatenate([x, target]).astype(np.float64)
    mean, covariance = both.mean(0), np.cov(both.T, bias=True)
    covariance += ridge * np.trace(covariance) / x.shape[1] * np.eye(x.shape[1])
    lower = np.linalg.cholesky(covariance)
    turned = [np.linalg.solve(lower, (rows - mean).T).T for rows in (x, target)]
    a, b = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in turned)
    ranked = [np.lexsort((keys, -(a @ t).astype(np.float32))) for t in b]
    layers, seen = [], set()
    for i in range(len(x)):
        layers.append({int(one[i]) for one in ranked} - seen)
        seen |= layers[-1]
    return layers


def test_layers_are_those_of_dense_whitening():
    x, target = skewed(200, 6), skewed(7, 6, seed=5)
    layers = naive_layers(x, target, 1e-3, keys_of(None, 200))
    made = selectors.Tarot().select(60, x=x.astype(np.float32), target=target)
    order, layer = made.indices.tolist(), made.evidence["layer"]
    assert (np.diff(layer) >= 0).all()
    for i in range(layer.max()):  # whole layers, the last one in part
        assert {row for row, at in zip(order, layer, strict=True) if at == i} == layers[i]
    assert {row for row, at in zip(order, layer, strict=True) if at == layer.max()} <= layers[layer.max()]


def test_copies_of_target_rows_come_first():
    x, target = skewed(300, 10), skewed(9, 10, seed=3)
    places = np.arange(17, 300, 33)
    x[places] = target
    made = selectors.Tarot().select(30, x=x, target=target)
    assert set(made.indices[:9].tolist()) == set(places.tolist())
    assert np.abs(made.evidence["distance"][:9]).max() < 1e-3


@pytest.mark.parametrize("n", [1, 2, 7, 8, 9, 50, 199, 200])
def test_the_budget_is_exact(n):
    assert len(selectors.Tarot().select(n, x=skewed(200, 6), target=skewed(7, 6, seed=5))) == n


def test_a_far_row_is_last_of_its_layer_and_lightest():
    target = np.eye(6)[:4]
    x = np.concatenate([target + 0.01, [[0.3, 0, 0, 0, 2, 2]]])  # nobody's nearest until all others are taken
    made = selectors.Tarot(whiten="none", weights=True).select(5, x=x, target=target)
    assert made.indices[-1] == 4
    assert made.weights.argmin() == 4 and made.weights.sum() == pytest.approx(1)
    layer = np.concatenate([np.random.default_rng(0).normal(0, 0.05, (6, 6)) + target[0], [[0.2, 0, 0, 0, 3, 3]]])
    many = np.random.default_rng(1).normal(0, 0.05, (7, 6)) + target[0]
    from llmselect.kernels.cosine import unit
    from llmselect.selectors.tarot import by_potential, distances

    assert by_potential(distances(unit(layer), unit(many)), np.arange(7), np.arange(7, dtype=np.uint64), 0.05)[-1] == 6


def test_wide_features_are_folded_and_keep_their_cosines():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((300, 4000)) + 2 * rng.standard_normal((300, 1))
    found = Rows(x, dim=2000)[:]
    dense = Rows(x)[:]
    assert found.shape == (300, 2000)
    assert np.corrcoef((found @ found.T)[np.triu_indices(300, 1)], (dense @ dense.T)[np.triu_indices(300, 1)])[0, 1] > 0.99


# The automatic ratio


def brute_force(x: np.ndarray, target: np.ndarray, folds: int, patience: int) -> tuple[set[int], list[list[float]]]:
    """The definition, every transport solved anew on costs computed anew. `x` and `target` are unit rows."""
    chosen, curves = set(), []
    fold = np.arange(len(target)) % folds
    for f in range(folds):
        choosers, judges = target[fold == f], target[fold != f]
        curve, sets = [], []
        for k in range(1, len(x) + 1):
            near = [np.argsort(-(x @ t), kind="stable")[:k] for t in choosers]
            rows = sorted({int(r) for ranked, t in zip(near, choosers, strict=True) for r in ranked if x[r] @ t > 0})
            cost = np.sqrt(np.maximum(2 - 2 * x[rows] @ judges.T, 0))
            curve.append(ot.emd2(np.full(len(rows), 1 / len(rows)), np.full(len(judges), 1 / len(judges)), cost))
            sets.append(set(rows))
            if k > int(np.argmin(curve)) + patience:
                break
        chosen |= sets[int(np.argmin(curve))]
        curves.append(curve)
    return chosen, curves


@pytest.mark.parametrize("patience", [1, 3])
def test_the_curve_and_the_set_are_those_of_brute_force(patience):
    rng = np.random.default_rng(2)
    unit = lambda rows: rows / np.linalg.norm(rows, axis=1, keepdims=True)  # noqa: E731
    x, target = unit(rng.standard_normal((80, 8))), unit(rng.standard_normal((20, 8)))
    made = selectors.TarotAuto(whiten="none", patience=patience, folds=5).select("100%", x=x, target=target)
    expected, curves = brute_force(x, target, 5, patience)
    assert set(made.indices.tolist()) == expected
    told = made.provenance["report"]
    assert [np.allclose(a["curve"], b, atol=1e-6) for a, b in zip(told["folds"], curves, strict=True)] == [True] * 5
    assert [one["best"] for one in told["folds"]] == [int(np.argmin(curve)) + 1 for curve in curves]
    assert told["ratio"] == len(expected) / 80
    assert len(selectors.TarotAuto(whiten="none", folds=5).select(4, x=x, target=target)) == 4


def test_automatic_size_needs_two_targets_and_one_row_towards_them():
    x = np.random.default_rng(0).standard_normal((30, 5))
    with pytest.raises(UsageError, match="at least 2 target rows"):
        selectors.TarotAuto().select("100%", x=x, target=x[:1])
    with pytest.raises(LlmselectError, match="no row of the pool points towards"):
        selectors.TarotAuto(whiten="none").select("100%", x=-np.abs(x), target=np.abs(x[:4]))
