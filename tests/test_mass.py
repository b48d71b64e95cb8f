"""MASS-style scores against pairs of tags counted one by one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array

from llmselect.errors import LlmselectError, UsageError
from llmselect.selectors.mass import Mass

SEEDS = st.integers(0, 2**32 - 1)


def naive(x, target, threshold, binary, edges, per_tag):
    kept = lambda rows: np.where(rows > threshold, 1.0 if binary else rows, 0.0)  # noqa: E731
    x, target, out = kept(x), kept(target), []
    for s in x:
        total = 0.0
        for j in range(len(s)):
            for other in range(len(s)):
                together = np.mean([t[j] * t[other] for t in target])
                total += s[j] * s[other] * together * (1.0 if j == other else edges)
        out.append(total / (s.sum() or 1) if per_tag else total)
    return np.array(out)


@settings(max_examples=60)
@given(seed=SEEDS, threshold=st.sampled_from([0.0, 0.4]), binary=st.booleans(), edges=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
       per_tag=st.booleans(), sparse=st.booleans())  # fmt: skip
def test_scores_are_those_of_the_formula(seed, threshold, binary, edges, per_tag, sparse):
    rng = np.random.default_rng(seed)
    x, target = (np.where(rng.random((n, 6)) < 0.5, rng.random((n, 6)), 0).astype(np.float32) for n in (15, 4))
    x[0], target[0] = 0, 0.9
    method = Mass(threshold=threshold, binary=binary, edges=edges, per_tag=per_tag)
    made = method.select(15, x=csr_array(x) if sparse else x, target=csr_array(target) if sparse else target)
    expected = naive(x.astype(float), target.astype(float), np.float32(threshold), binary, edges, per_tag)
    np.testing.assert_allclose(made.scores, expected, rtol=1e-5, atol=1e-7)
    assert made.indices.tolist() == np.lexsort((np.arange(15), -made.scores)).tolist()


def test_skills_that_come_together_in_the_target_count_more_than_those_that_do_not():
    target = np.array([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1], [0, 0, 1, 0], [0, 0, 0, 1.0]])
    x = np.array([[1, 1, 0, 0], [0, 0, 1, 1], [1, 0, 0, 0], [1, 1, 1, 1.0]])  # all tags are equally frequent
    assert Mass().select(1, x=x, target=target).indices.tolist() == [0]
    np.testing.assert_allclose(Mass().select(4, x=x, target=target).scores, [2 / 3, 1 / 3, 1 / 3, 1 / 2], atol=1e-7)
    assert Mass(edges=0).select(4, x=x, target=target).scores == pytest.approx([1 / 3] * 4)
    assert Mass(per_tag=False).select(1, x=x, target=target).indices.tolist() == [3]


def test_mistakes_are_named():
    for wrong in ({"threshold": -1.0}, {"edges": -0.5}):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            Mass(**wrong)
    with pytest.raises(LlmselectError, match=r"negative.*\[1\]"):
        Mass().select(1, x=np.array([[1.0], [-1]]), target=np.ones((1, 1)))
    with pytest.raises(LlmselectError, match=r"none of 2 rows has a tag above 0\.5"):
        Mass(threshold=0.5).select(1, x=np.ones((3, 2)), target=np.full((2, 2), 0.5))
