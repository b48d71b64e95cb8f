"""Coverage-centric selection against the text of the paper, written as plain loops."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmselect.errors import UsageError
from llmselect.kernels.groups import rounds, waterfill
from llmselect.selectors.ccs import Ccs

SEEDS = st.integers(0, 2**32 - 1)


def strata(scores: list[float], kind: str, bins: int) -> list[int]:
    """Strata of distinct scores, one by one."""
    ranked, low = sorted(scores), min(scores)
    if kind == "quantile":
        return [ranked.index(s) * bins // len(scores) for s in scores]
    if kind == "log":
        middle = float(np.median([s - low for s in scores if s > low] or [1.0]))
        scores = [float(np.log(1 + (s - low) / middle)) for s in scores]
    low, high = min(scores), max(scores)
    return [min(bins - 1, int(bins * (s - low) / (high - low))) if high > low else 0 for s in scores]


@settings(max_examples=150)
@given(seed=SEEDS, n=st.integers(1, 80), bins=st.integers(1, 12), kind=st.sampled_from(["range", "quantile", "log"]),
       beta=st.sampled_from([0.0, 0.1, 0.3, 0.75]), hard=st.sampled_from(["largest", "smallest"]))  # fmt: skip
def test_the_hardest_go_and_every_stratum_has_its_waterfill_share(seed, n, bins, kind, beta, hard):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(n) * np.exp(3 * rng.standard_normal(n))
    sign = 1 if hard == "largest" else -1
    order = sorted(range(n), key=lambda i: sign * x[i])  # easiest first
    kept = order[: n - int(beta * n + 1e-9)]
    expected = dict(zip(kept, strata([x[i] for i in kept], kind, bins), strict=True))
    method = Ccs(beta=beta, bins=bins, strata=kind, hard=hard)
    sizes = [sum(s == b for s in expected.values()) for b in range(bins)]
    for k in {1, n // 3 + 1, len(kept), n}:
        made = method.select(k, seed=seed, x=x)
        inside = made.indices[: len(kept)].tolist()
        assert set(inside) <= set(kept)
        assert made.indices[len(kept) :].tolist() == order[len(kept) : k], "dropped rows come last, the easiest first"
        assert made.evidence["stratum"].tolist() == [expected.get(int(i), -1) for i in made.indices]
        shares = [sum(expected[i] == b for i in inside) for b in range(bins)]
        assert sorted(shares) == sorted(waterfill(len(inside), sizes).tolist())


def test_of_scores_at_several_checkpoints_the_mean_counts():
    x = np.random.default_rng(3).standard_normal((50, 4)).astype(np.float32)
    several, mean = Ccs().select(20, x=x), Ccs().select(20, x=[sum(map(float, row)) / 4 for row in x])
    assert several.indices.tolist() == mean.indices.tolist()
    np.testing.assert_allclose(several.evidence["score"], [sum(map(float, x[i])) / 4 for i in several.indices])
    one = Ccs().select(20, x=x[:, :1])
    assert one.indices.tolist() == Ccs().select(20, x=x[:, 0]).indices.tolist() != several.indices.tolist()


def test_rows_of_a_stratum_are_equally_likely():
    x = np.concatenate([np.zeros(3), np.ones(9)])
    picks = np.concatenate([Ccs(beta=0, bins=2).select(4, seed=s, x=x).indices for s in range(6000)])
    rate = np.bincount(picks, minlength=12) / 6000
    assert np.allclose(rate[:3], 2 / 3, atol=0.03)
    assert np.allclose(rate[3:], 2 / 9, atol=0.03)


def test_a_heavy_tail_leaves_equal_widths_empty_and_not_the_others():
    x = np.exp(4 * np.random.default_rng(0).standard_normal(5000))
    made = {kind: Ccs(beta=0, strata=kind).select(5000, x=x) for kind in ("range", "log", "quantile")}
    used = {kind: len(set(one.evidence["stratum"])) for kind, one in made.items()}
    assert used["range"] < 20 < 40 < used["log"] <= used["quantile"] == 50


@pytest.mark.parametrize("wrong", [{"beta": 1.0}, {"beta": -0.1}, {"bins": 0}])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(UsageError, match=next(iter(wrong))):
        Ccs(**wrong)


@settings(max_examples=150)
@given(seed=SEEDS, n=st.integers(0, 40), groups=st.integers(1, 6))
def test_rounds_take_one_row_of_each_group(seed, n, groups):
    rng = np.random.default_rng(seed)
    group, within, between = (rng.integers(0, groups, n) for _ in range(3))
    keys = rng.permutation(n).astype(np.uint64)
    left = [sorted((i for i in range(n) if group[i] == g), key=lambda i: (within[i], keys[i])) for g in range(groups)]
    wanted = []
    while any(left):
        turn = [rows.pop(0) for rows in left if rows]
        wanted += sorted(turn, key=lambda i: (between[i], keys[i]))
    assert rounds(group, within, between, keys).tolist() == wanted
