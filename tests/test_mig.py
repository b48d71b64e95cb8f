"""MIG against all gains computed at every step, on dense matrices."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array

from llmselect.errors import LlmselectError, UsageError
from llmselect.kernels.sparse import gathered
from llmselect.selectors.mig import Mig

SEEDS = st.integers(0, 2**32 - 1)


def tags(seed: int, n: int, width: int, soft: bool = False) -> np.ndarray:
    rng = np.random.default_rng(seed)
    held = rng.random((n, width)) < rng.choice([0.1, 0.5], width)
    held[:, width // 2] = held[:, 0] ^ (rng.random(n) < 0.05)  # two tags that mostly come together
    return (held * (rng.random((n, width)) if soft else 1.0)).astype(np.float32).astype(float)


def propagation(x: np.ndarray, tau: float | None, alpha: float) -> np.ndarray:
    width = x.shape[1]
    w = np.eye(width)
    for j in range(width):
        for m in range(width):
            length = np.linalg.norm(x[:, j]) * np.linalg.norm(x[:, m])
            if j != m and tau is not None and length and x[:, j] @ x[:, m] / length > tau:
                w[j, m] = alpha * (x[:, j] @ x[:, m]) / length
    return w / w.sum(0)


def greedy(v: np.ndarray, p: np.ndarray, k: int, power: float) -> tuple[list[int], list[float]]:
    x, z = v @ p, np.zeros(p.shape[1])
    order, gains = [], []
    for _ in range(k):
        gain = x @ (power * (z + 1e-6) ** (power - 1))
        gain[order] = -1
        order.append(int(gain.argmax()))
        gains.append(float(gain.max()))
        z += x[order[-1]]
    return order, gains


@settings(max_examples=80)
@given(seed=SEEDS, n=st.integers(1, 40), tau=st.sampled_from([None, 0.3, 0.9]), alpha=st.sampled_from([0.0, 0.5, 1.0]),
       power=st.sampled_from([0.3, 0.8]), soft=st.booleans(), sparse=st.booleans())  # fmt: skip
def test_the_order_is_that_of_the_full_greedy(seed, n, tau, alpha, power, soft, sparse):
    x = tags(seed, n, 7, soft)
    quality = np.random.default_rng(seed).random(n) + 0.1
    order, gains = greedy(quality[:, None] * x, propagation(x, tau, alpha), n, power)
    made = Mig(tau=tau, alpha=alpha, power=power).select(n, x=csr_array(x) if sparse else x, quality=quality)
    assert np.allclose(made.evidence["gain"], gains, rtol=1e-6)
    some = np.array(gains) > 0  # rows without a tag gain nothing and come last, by id
    assert made.indices[some].tolist() == np.array(order)[some].tolist()
    assert made.indices[~some].tolist() == sorted(made.indices[~some].tolist())


def test_tags_that_come_together_share_their_mass():
    x = np.zeros((40, 3))
    x[0, 0] = x[1, 1] = x[2, 2] = 1
    x[3:, :2] = 1
    quality = np.array([1.0, 0.9, 0.8] + [0.0] * 37)
    assert Mig(tau=None).select(3, x=x, quality=quality).indices.tolist() == [0, 1, 2]
    assert Mig(tau=0.9).select(3, x=x, quality=quality).indices.tolist() == [0, 2, 1]
    assert Mig(tau=0.9, alpha=0).select(3, x=x, quality=quality).indices.tolist() == [0, 1, 2]


def test_equal_rows_go_by_id_and_negative_qualities_are_shifted():
    x = np.repeat(np.eye(3), 4, axis=0)
    assert Mig().select(12, x=x, quality=np.ones(12)).indices.tolist() == [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]
    quality = np.random.default_rng(0).standard_normal(12)
    shifted = Mig().select(12, x=x, quality=quality - quality.min())
    assert Mig().select(12, x=x, quality=quality).indices.tolist() == shifted.indices.tolist()
    assert shifted.indices[-1] == quality.argmin()


def test_few_gains_are_computed_and_every_smaller_budget_is_a_prefix():
    x, quality = csr_array(tags(3, 4000, 60)), np.random.default_rng(1).random(4000)
    made = Mig(tau=None).select(400, x=x, quality=quality)
    assert 400 <= made.provenance["report"]["evaluations"] < 400 * 4000 / 20
    assert Mig(tau=None).select(50, x=x, quality=quality).indices.tolist() == made.indices[:50].tolist()


def test_the_selection_covers_more_than_chance():
    x, rng = tags(5, 600, 30), np.random.default_rng(5)
    quality = rng.random(600)
    p = propagation(x, 0.9, 1.0)

    def value(chosen: np.ndarray) -> float:
        return float((((quality[:, None] * x @ p)[chosen].sum(0) + 1e-6) ** 0.8).sum())

    made = value(Mig().select(40, x=x, quality=quality).indices)
    assert made > 1.3 * max(value(rng.permutation(600)[:40]) for _ in range(20))


@pytest.mark.parametrize("rows", [5, 7, 10, 23])
def test_a_similarity_of_exactly_tau_is_not_above_it(rows):
    for shared in range(1, rows):
        tags = np.zeros((2 * rows, 2))
        tags[:rows, 0] = tags[rows - shared : 2 * rows - shared, 1] = 1
        tau = shared / rows  # the cosine of the two
        assert not Mig(tau=tau)._spread(gathered(tags))[0, 1]
        assert Mig(tau=tau - 1e-3)._spread(gathered(tags))[0, 1] > 0


def test_mistakes_are_named():
    with pytest.raises(LlmselectError, match=r"negative.*\[3\]"):
        Mig().select(2, x=np.where(np.arange(9)[:, None] == 3, -1.0, 1.0) * np.ones((9, 4)), quality=np.ones(9))
    for wrong in ({"tau": 2.0}, {"alpha": -1.0}, {"power": 1.5}, {"power": 0.0}):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            Mig(**wrong)
