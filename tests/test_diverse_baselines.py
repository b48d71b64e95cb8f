"""Deita, CaR and InsTag against their papers' procedures in plain loops."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array

from llmselect.errors import LlmselectError, UsageError
from llmselect.kernels import filtering
from llmselect.selectors.car import Car
from llmselect.selectors.deita import Deita
from llmselect.selectors.instag import InsTag
from llmselect.selectors.mona import Mona
from llmselect.selectors.quad import Quad
from llmselect.selectors.set_functions import FacilityLocation, GraphCut, LogDet
from llmselect.selectors.topk import TopK

SEEDS = st.integers(0, 2**32 - 1)


def kept_apart(x: np.ndarray, quality: np.ndarray, k: int, limit: float) -> tuple[list[int], list[float]]:
    """Rows in the order they are selected, and each one's largest cosine to those kept before it was met."""
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    kept, rejected, near = [], [], {}
    for i in sorted(range(len(x)), key=lambda i: (-quality[i], i)):
        near[i] = max((float(unit[i] @ unit[j]) for j in kept), default=-1.0)
        (kept if near[i] <= limit else rejected).append(i)
        if len(kept) == k:
            break
    order = (kept + rejected)[:k]
    return order, [near[i] for i in order]


@settings(max_examples=150)
@given(seed=SEEDS, n=st.integers(1, 40), limit=st.sampled_from([-1.0, 0.0, 0.3, 0.9]), block=st.sampled_from([1, 3, 1024]))
def test_deita_keeps_what_is_far_from_every_better_row(seed, n, limit, block):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((4, 3))[rng.integers(0, 4, n)] + 0.3 * rng.standard_normal((n, 3))
    quality = rng.integers(0, 6, n).astype(float)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(filtering, "BLOCK", block)
        for k in {1, n // 2 + 1, n}:
            made = Deita(limit=limit).select(k, x=x, quality=quality)
            order, near = kept_apart(x, quality, k, limit)
            assert made.indices.tolist() == order
            assert np.allclose(made.evidence["cosine"], near, atol=1e-6)


@pytest.mark.parametrize("block", [1, 1024])
def test_deita_drops_copies_whatever_their_length_and_a_limit_of_1_drops_none(block, monkeypatch):
    monkeypatch.setattr(filtering, "BLOCK", block)
    x = np.random.default_rng(0).standard_normal((300, 9))
    x[150:] = 3.7 * x[:150]
    quality = np.arange(300.0)
    assert Deita(limit=0.9999).select(150, x=x, quality=quality).indices.tolist() == list(range(299, 149, -1))
    assert Deita(limit=1.0).select(300, x=x, quality=quality).indices.tolist() == list(range(299, -1, -1))


def test_deita_stops_reading_when_it_has_enough(monkeypatch):
    reached = []
    x = np.eye(6000, 40)[np.arange(6000) % 40]

    class Counting:
        shape, ids = x.shape, None

        def __getitem__(self, rows):
            reached.append(None if isinstance(rows, slice) else len(rows))
            return x[rows]

    monkeypatch.setattr(filtering, "BLOCK", 16)
    made = Deita().select(30, x=Counting(), quality=-np.arange(6000.0))
    assert made.indices.tolist() == list(range(30))
    assert [r for r in reached if r is not None] == [16, 16]


@settings(max_examples=150)
@given(seed=SEEDS, n=st.integers(1, 40), share=st.sampled_from([0.0, 0.25, 0.5, 0.9, 1.0]), groups=st.integers(1, 6))
def test_car_fills_places_from_all_and_from_clusters(seed, n, share, groups):
    rng = np.random.default_rng(seed)
    quality, group = rng.integers(0, 9, n).astype(float), rng.integers(0, groups, n)
    ranked = sorted(range(n), key=lambda i: (-quality[i], i))
    turn = {i: sum(group[j] == group[i] for j in ranked[: ranked.index(i)]) for i in ranked}
    by_cluster = sorted(ranked, key=lambda i: (turn[i], -quality[i], i))
    taken: list[int] = []
    for place in range(1, n + 1):
        of_all = int(100 * share * place) // 100 > int(100 * share * (place - 1)) // 100
        taken.append(next(i for i in (ranked if of_all else by_cluster) if i not in taken))
    for k in {1, n // 2 + 1, n}:
        made = Car(share=share).select(k, quality=quality, groups=group)
        assert made.indices.tolist() == taken[:k]
        assert made.evidence["group"].tolist() == group[made.indices].tolist()
        assert (~made.evidence["cluster"]).sum() == int(100 * share * k) // 100


def test_car_is_topk_at_one_end_and_covers_every_cluster_at_the_other():
    rng = np.random.default_rng(1)
    quality, group = rng.standard_normal(90), rng.choice(["a", "b", "c"], 90, p=[0.9, 0.05, 0.05])
    assert (
        Car(share=1).select(20, quality=quality, groups=group).indices.tolist() == TopK().select(20, x=quality).indices.tolist()
    )
    assert set(group[Car(share=0).select(3, quality=quality, groups=group).indices]) == {"a", "b", "c"}


@settings(max_examples=200)
@given(seed=SEEDS, n=st.integers(1, 30), tags=st.integers(1, 8), share=st.floats(0.05, 0.9), sparse=st.booleans())
def test_instag_is_the_procedure_of_the_paper(seed, n, tags, share, sparse):
    rng = np.random.default_rng(seed)
    x = np.where(rng.random((n, tags)) < share, rng.random((n, tags)) + 0.1, 0)
    left = sorted((i for i in range(n) if x[i].any()), key=lambda i: (-(x[i] > 0).sum(), i))
    order, passes = [], []
    while left:
        seen: set[int] = set()
        for i in list(left):
            held = set(np.flatnonzero(x[i]).tolist())
            if held - seen:
                seen |= held
                order.append(i)
                left.remove(i)
        passes += [passes[-1] + 1 if passes else 0] * (len(order) - len(passes))
    empty = [i for i in range(n) if not x[i].any()]
    made = InsTag().select(n, x=csr_array(x) if sparse else x)
    assert made.indices.tolist() == order + empty
    assert made.evidence["round"][: len(order)].tolist() == passes
    assert made.evidence["tags"].tolist() == (x > 0).sum(1)[made.indices].tolist()


def test_instag_ignores_zeros_that_are_stored():
    rows = [([0, 1], [1, 1]), ([0, 2, 3], [1, 0, 0]), ([2], [1])]  # with its zeros row 1 would have most tags, two of them new
    columns, values = (np.concatenate([row[i] for row in rows]) for i in (0, 1))
    made = InsTag().select(3, x=csr_array((values.astype(float), columns, np.array([0, 2, 5, 6])), shape=(3, 4)))
    assert made.indices.tolist() == [0, 2, 1]
    assert made.evidence["tags"].tolist() == [2, 1, 1]
    assert made.evidence["round"].tolist() == [0, 0, 1]


def test_deita_multiplies_several_scores():
    rng = np.random.default_rng(0)
    x, both = rng.standard_normal((60, 3)), rng.integers(0, 6, (60, 2)).astype(np.float16)
    made = Deita(limit=0.5).select(20, x=x, quality=both)
    assert made.indices.tolist() == Deita(limit=0.5).select(20, x=x, quality=both[:, 0] * both[:, 1]).indices.tolist()
    assert made.scores.tolist() == both.astype(float).prod(1).tolist()
    one = [Deita().select(20, x=x, quality=-quality).indices.tolist() for quality in (both[:, :1], both[:, 0])]
    assert one[0] == one[1]  # one score may be negative
    both[7, 1] = -1
    with pytest.raises(LlmselectError, match=r"rows \[7\] have negative scores"):
        Deita().select(20, x=x, quality=both)


@pytest.mark.parametrize(("cls", "wrong"), [(Deita, {"limit": 1.1}), (Car, {"share": -0.1}), (Car, {"share": 2}),
                                            (FacilityLocation, {"neighbours": 0}), (GraphCut, {"penalty": -0.1}),
                                            (LogDet, {"scale": 0.0}), (LogDet, {"dim": 0}), (Mona, {"evidence": -1}),
                                            (Quad, {"clusters": 0})])  # fmt: skip
def test_impossible_settings_are_refused(cls, wrong):
    with pytest.raises(UsageError, match=next(iter(wrong))):
        cls(**wrong)
