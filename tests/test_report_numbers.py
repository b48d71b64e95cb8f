"""The numbers behind the report: the plane of the map, the best rejects, which rows are on the page."""

from __future__ import annotations

import numpy as np
import pytest

from llmselect.report.plane import Plane
from llmselect.report.views import best_of_groups, best_rejects, rows_shown, view_of
from llmselect.selection import Selection


@pytest.mark.parametrize("n,d", [(300, 5), (40, 1500)])
def test_the_plane_holds_the_largest_variance_and_finds_the_nearest_target(n, d):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, d)) * np.linspace(3, 0.1, d)
    target = rng.normal(size=(6, d))
    unit, others = (a / np.linalg.norm(a, axis=1, keepdims=True) for a in (x, target))
    stored, aims = x.view(type("A", (np.ndarray,), {"non_finite": np.array([3])})), target.view(
        type("B", (np.ndarray,), {"non_finite": np.zeros(0, np.int64)}))  # fmt: skip
    made, rows = Plane(stored), np.arange(n)
    place = made.project(stored, rows)
    assert np.isnan(place[3]).all() and np.isfinite(np.delete(place, 3, 0)).all()
    kept = np.delete(unit, 3, 0)
    s = np.linalg.svd(kept - kept.mean(0), compute_uv=False)
    if d <= 1024:
        assert np.delete(place, 3, 0).var(0) == pytest.approx(s[:2] ** 2 / len(kept), rel=1e-6)
        assert made.share == pytest.approx((s[:2] ** 2).sum() / (s**2).sum())
    index, cosine = made.nearest(rows, aims)
    similar = unit @ others.T
    assert index[3] == -1 and np.delete(index, 3).tolist() == np.delete(similar.argmax(1), 3).tolist()
    np.testing.assert_allclose(np.delete(cosine, 3), np.delete(similar.max(1), 3), atol=1e-6)


def test_rejects_follow_the_direction_of_the_method():
    scores = np.array([[0.1, 0.9], [0.5, 0.2], [np.nan, 1], [0.3, 0.3], [0.0, 0.6]])
    up, down = best_of_groups(scores), best_of_groups(scores, down=True)
    assert best_rejects(up, np.array([0])).tolist() == [4, 1, 3]
    assert best_rejects(-down, np.array([4])).tolist() == [0, 1, 3]
    made = Selection(np.array([4]), 5, scores, provenance={"config": {"order": "asc"}})
    assert view_of("low", made, np.arange(1, 6)).reject_score.tolist() == [0.1, 0.2, 0.3]


@pytest.mark.parametrize("sample", [10, 50, 119])
def test_the_page_never_holds_more_rows_than_asked_for(sample):
    rng = np.random.default_rng(sample)
    made = [Selection(rng.choice(500, 60, replace=False), 500, rng.random(500)) for _ in range(9)]
    views = [view_of(str(i), one, np.arange(1, 501)) for i, one in enumerate(made)]
    shown, full = rows_shown(views, 500, sample)
    assert len(shown) == sample == len(np.unique(shown)) and np.isin(full, shown).all()
