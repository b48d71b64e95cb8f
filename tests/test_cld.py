"""Correlation of loss trajectories against NumPy's correlation, row by row."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from llmselect.errors import LlmselectError, UsageError
from llmselect.selectors.cld import Cld

SEEDS = st.integers(0, 2**32 - 1)


def losses(seed: int, n: int, steps: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return 3 + rng.standard_normal((n, 1)) + np.cumsum(rng.standard_normal((n, steps)) * 0.2 - 0.1, axis=1)


def correlations(x: np.ndarray, target: np.ndarray, named: list[str], difference: bool) -> np.ndarray:
    """`[n, G]`, groups by name."""
    columns = []
    for name in sorted(set(named)):
        mean = np.mean([row for row, group in zip(target, named, strict=True) if group == name], axis=0)
        pairs = [(np.diff(row), np.diff(mean)) if difference else (row, mean) for row in x]
        columns.append([stats.pearsonr(a, b).statistic for a, b in pairs])
    return np.array(columns).T


@settings(max_examples=80)
@given(seed=SEEDS, steps=st.integers(5, 20), difference=st.booleans(), k=st.integers(1, 25))
def test_scores_are_pearson_correlations(seed, steps, difference, k):
    x, target, named = losses(seed, 25, steps), losses(seed + 1, 5, steps), ["b", "a", "b", "a", "a"]
    r = correlations(x, target, named, difference)
    for across, expected in (("mean", r.mean(1)), ("max", r.max(1)), ("round_robin", r)):
        made = Cld(difference=difference, across=across).select(k, x=x, target=target, target_groups=named)
        assert np.allclose(made.scores, expected, atol=1e-6)
        if across != "round_robin":
            assert made.indices.tolist() == np.lexsort((np.arange(25), -made.scores))[:k].tolist()
        picked = r[made.indices, [["a", "b"].index(g) for g in made.evidence["group"]]]
        assert np.allclose(made.evidence["r"], picked, atol=1e-6)
        clipped = np.clip(picked, -1 + 1e-7, 1 - 1e-7)
        assert np.allclose(np.tanh(made.evidence["z"] / np.sqrt(steps - difference - 3)), clipped, atol=1e-6)
    assert made.evidence["group"].tolist() == (["a", "b"] * 13)[:k]
    alone = Cld(difference=difference).select(k, x=x, target=target)
    assert np.allclose(alone.scores, correlations(x, target, ["all"] * 5, difference)[:, 0], atol=1e-6)


@pytest.mark.parametrize("difference", [True, False])
def test_shift_and_scale_of_a_row_change_nothing_and_a_row_that_stands_still_is_0(difference):
    x, target = losses(0, 6, 12), losses(1, 3, 12)
    x[1] = 5 * x[0] + 40
    x[2] = -x[0]
    x[3] = np.float32(2.7) * (1 + 1e-7 * np.sin(np.arange(12)))
    made = Cld(difference=difference).select(6, x=x, target=target)
    assert made.scores[1] == pytest.approx(made.scores[0], abs=1e-6)
    assert made.scores[2] == pytest.approx(-made.scores[0], abs=1e-6)
    assert made.scores[3] == 0


def test_a_common_decline_is_all_that_ltc_sees():
    rng = np.random.default_rng(3)
    decline = np.linspace(4, 1, 20)
    target = decline + 0.1 * rng.standard_normal((1, 20))
    x = decline + 0.1 * rng.standard_normal((200, 20))
    x[7] = decline[::-1] + 2 * (target[0] - decline)  # rises, yet moves with the target from step to step
    assert Cld().select(1, x=x, target=target).indices.tolist() == [7]
    assert Cld(difference=False).select(200, x=x, target=target).indices[-1] == 7


def test_noise_correlates_as_the_docstring_and_fisher_say():
    noise = np.random.default_rng(0).standard_normal
    for difference in (True, False):  # three numbers each
        x = noise((40_000, 3))
        x = np.cumsum(np.concatenate([np.zeros((len(x), 1)), x], axis=1), axis=1) if difference else x
        target = np.cumsum([[0.0, 0.5, -1.0, 0.7]], axis=1) if difference else np.array([[0.5, -1.0, 0.7]])
        made = Cld(difference=difference).select(10, x=x, target=target)
        assert (made.scores > 0.9).mean() == pytest.approx(1 / 7, abs=0.01)
        assert "z" not in made.evidence
    z = Cld(difference=False).select(20_000, x=noise((20_000, 20)), target=noise((1, 20))).evidence["z"]
    assert z.std() == pytest.approx(1, abs=0.03)


def test_mistakes_are_named():
    with pytest.raises(UsageError, match="3 checkpoints; a correlation needs at least 4"):
        Cld().select(2, x=losses(0, 5, 3), target=losses(1, 2, 3))
    with pytest.raises(LlmselectError, match=r"target rows \[2\] have no finite loss"):
        Cld().select(2, x=losses(0, 5, 6), target=np.where(np.arange(3)[:, None] == 2, np.nan, losses(1, 3, 6)),
                     target_groups=["a", "a", "b"])  # fmt: skip
    with pytest.raises(LlmselectError, match=r"target groups \['b'\] moves evenly or not at all"):
        Cld().select(2, x=losses(0, 5, 6), target=np.where(np.arange(3)[:, None] == 2, 1.0, losses(1, 3, 6)),
                     target_groups=np.array(["a", "a", "b"]))  # fmt: skip
    with pytest.raises(LlmselectError, match="mean loss of the target moves evenly"):
        Cld().select(2, x=losses(0, 5, 6), target=np.ones((1, 6)))
