"""Kernels against naive oracles: plain loops in fp64 and Python integers, and scikit-learn's cosine for Similarity."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics.pairwise import cosine_similarity

from llmselect.arrays import Ids, digest_ids
from llmselect.errors import LlmselectError, UsageError
from llmselect.kernels import cosine, keyed
from llmselect.kernels.cosine import best_per_target, similarity_blocks, unit, unit_targets
from llmselect.kernels.groups import round_robin, waterfill
from llmselect.kernels.keyed import Keyed, keys_of
from llmselect.kernels.topk import topk_stable
from llmselect.kernels.turns import take_turns
from llmselect.selectors.similarity import Similarity
from llmselect.selectors.topk import TopK

SEEDS = st.integers(0, 2**32 - 1)
many = settings(max_examples=200)
ALL_COMBINATIONS = [(c, a) for c in ("round_robin", "mean", "max") for a in ("round_robin", "mean", "max")]


def shuffled_keys(rng: np.random.Generator, n: int) -> np.ndarray:
    """Distinct keys, many of them beyond 2**53, where a comparison in fp64 would merge neighbours."""
    return (np.uint64(2**64 - 1) - rng.permutation(n).astype(np.uint64)) if n else np.zeros(0, np.uint64)


def sign_vectors(rng: np.random.Generator, n: int, d: int = 4) -> np.ndarray:
    """Rows of ±1: for d a power of four, norms and cosines are exact in fp32, so that equal cosines are equal bits."""
    return rng.choice(np.array([-1.0, 1.0], np.float32), (n, d))


# topk_stable


@many
@given(
    scores=st.lists(st.integers(-3, 3) | st.floats(allow_nan=False, allow_infinity=False, width=64), max_size=40),
    k=st.integers(-1, 45),
    seed=SEEDS,
    largest=st.booleans(),
)
def test_topk_is_a_full_sort(scores, k, seed, largest):
    rng = np.random.default_rng(seed)
    keys = shuffled_keys(rng, len(scores))
    sign = -1 if largest else 1
    wanted = sorted(range(len(scores)), key=lambda i: (sign * float(scores[i]), int(keys[i]), i))[: max(k, 0)]
    got = topk_stable(np.array(scores, np.float64), k, keys, largest=largest)
    assert got.dtype == np.int64
    assert got.tolist() == wanted


def test_topk_breaks_equal_keys_by_index():
    assert topk_stable(np.zeros(6), 4, np.array([2, 1, 1, 2, 1, 0], np.uint64)).tolist() == [5, 1, 2, 4]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_topk_names_rows_without_a_rank(bad):
    scores = np.zeros(9)
    scores[[4, 7]] = bad
    with pytest.raises(LlmselectError, match=r"2 rows .*\[4, 7\]"):
        topk_stable(scores, 2, np.arange(9, dtype=np.uint64))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.int64, np.uint8, bool])
def test_topk_takes_any_number(dtype):
    scores = np.array([0, 1, 1, 0, 1], dtype)
    for largest, wanted in ((True, [4, 2, 1]), (False, [3, 0, 4])):
        assert topk_stable(scores, 3, np.arange(5, dtype=np.uint64)[::-1], largest=largest).tolist() == wanted


def test_scores_rank_at_their_own_precision():
    for x in (1 + 1e-9 * np.arange(4), 2**24 + np.arange(4), np.array([1.0, 1.0, 1.0, 1e300])):
        assert TopK().select(1, x=x).indices.tolist() == [3]


# waterfill


@many
@given(sizes=st.lists(st.integers(0, 30), max_size=12), k=st.integers(0, 200))
def test_waterfill_pours_row_by_row(sizes, k):
    got = waterfill(k, sizes)
    naive = np.zeros(len(sizes), np.int64)
    by_size = sorted(range(len(sizes)), key=lambda g: (sizes[g], g), reverse=True)
    for _ in range(min(k, sum(sizes))):
        open_groups = [g for g in by_size if naive[g] < sizes[g]]
        naive[min(open_groups, key=lambda g: naive[g])] += 1  # the emptiest, the largest group first
    assert got.dtype == np.int64
    assert got.tolist() == naive.tolist()
    assert got.sum() == min(k, sum(sizes))
    unfilled = [b for b, size in zip(got, sizes, strict=True) if b < size]
    assert not unfilled or max(got) - min(unfilled) <= 1


# round_robin and take_turns


@many
@given(seed=SEEDS, n=st.integers(1, 20), lists=st.integers(0, 5), k=st.integers(0, 25))
def test_round_robin_is_a_plain_draft(seed, n, lists, k):
    rng = np.random.default_rng(seed)
    ranked = [rng.permutation(n)[: rng.integers(0, n + 1)] for _ in range(lists)]
    rows, origin = round_robin(ranked, k, n)
    assert list(zip(rows.tolist(), origin.tolist(), strict=True)) == _draft(ranked, k)


def _draft(ranked: list[np.ndarray], k: int) -> list[tuple[int, int]]:
    """Rounds over the lists; a list whose rows are all taken passes."""
    taken: list[tuple[int, int]] = []
    while True:
        before = len(taken)
        for which, rows in enumerate(ranked):
            free = [int(r) for r in rows if int(r) not in {row for row, _ in taken}]
            if free and len(taken) < k:
                taken.append((free[0], which))
        if len(taken) == before:
            return taken


def _naive_turns(lists: list[np.ndarray], group: list[int], k: int, n: int) -> tuple[list[tuple[int, int]], bool]:
    """Endless rounds over the groups; inside one its queries answer in rotation; stop at the first empty-handed one."""
    rotation = {g: [q for q in range(len(lists)) if group[q] == g] for g in sorted(set(group))}
    taken: list[tuple[int, int]] = []
    while len(taken) < min(k, n):
        for queries in rotation.values():
            q = queries.pop(0)
            queries.append(q)
            free = [int(r) for r in lists[q] if int(r) not in {row for row, _ in taken}]
            if not free:
                return taken, True
            taken.append((free[0], q))
            if len(taken) == min(k, n):
                break
    return taken, False


@many
@given(
    seed=SEEDS,
    n=st.integers(1, 16),
    group=st.lists(st.integers(0, 3), min_size=1, max_size=6),
    k=st.integers(0, 20),
    whole=st.booleans(),
)
def test_take_turns_rotates_groups_and_queries(seed, n, group, k, whole):
    rng = np.random.default_rng(seed)
    lists = [rng.permutation(n)[: n if whole else rng.integers(0, n + 1)] for _ in group]
    place = np.array([group[:q].count(g) for q, g in enumerate(group)])
    rows, query, short = take_turns(lists, np.array(group), place, k, n)
    wanted, wanted_short = _naive_turns(lists, group, k, n)
    assert (list(zip(rows.tolist(), query.tolist(), strict=True)), short) == (wanted, wanted_short)
    assert not (whole and short)


# Keyed


@pytest.mark.parametrize("seed,stream", [(0, ""), (0, "row"), (1, "row"), (2**40, "x")])
def test_uniform_is_uniform(seed, stream):
    for keys in (np.arange(20_000, dtype=np.uint64), keys_of([f"row-{i}" for i in range(20_000)], 20_000)):
        draw = Keyed(seed, keys).uniform(stream)
        assert draw.dtype == np.float64
        assert stats.kstest(draw, "uniform").pvalue > 1e-4
        assert stats.kstest((draw * 2**20) % 1, "uniform").pvalue > 1e-4  # the low bits too


def test_seeds_and_streams_are_independent():
    keys = np.arange(20_000, dtype=np.uint64)
    draws = [Keyed(s, keys).uniform(t) for s in (0, 1) for t in ("", "row", "round")]
    correlation = np.corrcoef(draws) - np.eye(len(draws))
    assert np.abs(correlation).max() < 0.04
    assert np.abs(stats.pearsonr(draws[0][:-1], draws[0][1:]).statistic) < 0.04


def test_no_row_draws_in_one_stream_what_another_draws_in_a_second():
    """Keys that differ by the streams' words would, if a word were only laid over the key."""
    keys = np.arange(1000, dtype=np.uint64)
    words = Keyed(0, keys)._base("a") ^ Keyed(0, keys)._base("b")
    assert (Keyed(0, keys).uniform("a") != Keyed(0, keys ^ words).uniform("b")).all()


@given(seed=SEEDS, n=st.integers(1, 50))
def test_a_draw_depends_on_its_own_id_only(seed, n):
    rng = np.random.default_rng(seed)
    ids = np.array([f"id {i}" for i in rng.permutation(1000)[:n]])
    whole = Keyed(seed, keys_of(list(ids), n)).uniform("s")
    part = rng.permutation(n)[: rng.integers(1, n + 1)]
    assert (Keyed(seed, keys_of(list(ids[part]), len(part))).uniform("s") == whole[part]).all()


def _unmix(y: int) -> int:
    """The inverse of `keyed._mix`, in Python integers."""
    mask = 2**64 - 1
    for shift, factor in ((31, 0x94D049BB133111EB), (27, 0xBF58476D1CE4E5B9), (30, 1)):
        x = y
        for _ in range(64 // shift):
            x = y ^ (x >> shift)
        y = x * pow(factor, -1, 2**64) & mask
    return y


@pytest.mark.parametrize("bits", [0, 2**63, 2**64 - 2**11, 2**64 - 1])
def test_uniform_never_reaches_its_ends(bits):
    base = int(Keyed(0, np.zeros(0, np.uint64))._base(""))
    key = (_unmix(_unmix(bits) ^ base) - 0x9E3779B97F4A7C15) % 2**64
    assert int(keyed._mix(np.array([_unmix(bits)], np.uint64))[0]) == bits
    assert 0 < Keyed(0, np.array([key], np.uint64)).uniform()[0] < 1


def test_keys_of_long_ids_with_a_common_start_differ():
    padded = [f"{i:032d}" for i in range(50)]
    assert len(np.unique(keys_of(padded, 50))) == 50


@pytest.mark.parametrize("form", ["{0:032x}", "{0:x}{0:031x}", "row-{0}"])
def test_keys_are_the_same_from_a_list_and_from_a_store(form):
    ids = [form.format(i) for i in range(16)]
    assert keys_of(ids, 16).tolist() == keys_of(Ids(digest_ids(ids)), 16).tolist()


def test_generator_repeats_and_depends_on_seed_and_stream():
    draw = lambda seed, stream: Keyed(seed, np.zeros(0, np.uint64)).generator(stream).random(8).tolist()  # noqa: E731
    assert draw(0, "a") == draw(0, "a")
    assert len({tuple(draw(s, t)) for s in (0, 1) for t in ("a", "b")}) == 4


# Cosine


@pytest.mark.parametrize("scale", [1e-25, 1e-12, 1.0, 1e12, 1e25])
def test_unit_does_not_depend_on_the_scale(scale):
    rows = np.random.default_rng(0).standard_normal((5, 7))
    wanted = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    np.testing.assert_allclose(unit(rows * scale), wanted, atol=1e-6)


def test_rows_without_direction():
    assert (unit(np.zeros((2, 3))) == 0).all()
    for bad in (0.0, np.nan, np.inf):
        with pytest.raises(LlmselectError, match=r"\[1\]"):
            unit_targets(np.array([[1.0, 2.0], [bad, bad]]))
    pool = np.ones((20, 2))
    pool[13] = np.nan
    with pytest.raises(LlmselectError, match=r"\[13\]"):
        list(similarity_blocks(pool, unit_targets(np.ones((1, 2))), block=6))


@many
@given(seed=SEEDS, n=st.integers(1, 60), m=st.integers(1, 4), count=st.integers(1, 70), block=st.integers(1, 20))
def test_best_per_target_is_a_dense_sort(seed, n, m, count, block):
    rng = np.random.default_rng(seed)
    x, targets, keys = sign_vectors(rng, n), unit(sign_vectors(rng, m)), shuffled_keys(rng, n)
    dense = x.astype(np.float64) @ targets.T / 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cosine, "similarity_blocks", partial(similarity_blocks, block=block))
        best, largest = best_per_target(x, targets, count, keys)
        lists = [rows for rows, _ in best]
    for j, rows in enumerate(lists):
        assert rows.tolist() == np.lexsort((keys, -dense[:, j]))[:count].tolist()
    assert (largest == dense.max(1)).all()


@pytest.mark.parametrize("n,m,d", [(37, 1, 768), (100, 8, 12), (1000, 64, 768), (cosine.BLOCK + 1, 3, 771)])
def test_equal_rows_tie_wherever_they_lie(n, m, d):
    """A GEMM may round a row differently at the edge of a tile or block; equal rows must still go by their keys."""
    rng = np.random.default_rng(0)
    row, targets, keys = rng.standard_normal(d), unit(rng.standard_normal((m, d))), shuffled_keys(rng, n)
    best, _ = best_per_target(np.tile(row, (n, 1)), targets, 20, keys)
    for rows, _ in best:
        assert rows.tolist() == np.argsort(keys)[:20].tolist()


# Similarity against scikit-learn


def _judge(combine: str, across: str, x, target, group, k: int) -> list[int]:
    """The ranking by definition, from scikit-learn's dense fp64 cosines."""
    dense = cosine_similarity(x.astype(np.float64), target.astype(np.float64))
    if combine == "round_robin":
        return [row for row, _ in _naive_turns(list(np.argsort(-dense, axis=0).T), list(group), k, len(x))[0]]
    reduced = np.stack([getattr(dense[:, group == g], combine)(axis=1) for g in sorted(set(group))], axis=1)
    if across == "round_robin":
        return [row for row, _ in _draft(list(np.argsort(-reduced, axis=0).T), k)]
    return np.argsort(-getattr(reduced, across)(axis=1))[:k].tolist()


@pytest.mark.parametrize("combine,across", ALL_COMBINATIONS)
@pytest.mark.parametrize("tasks", [["a"], ["b", "a", "b", "c", "b"], ["z"] * 4])
@pytest.mark.parametrize("k", [1, 40, 150])
def test_similarity_is_what_scikit_learn_says(combine, across, tasks, k):
    rng = np.random.default_rng(len(tasks) + k)
    x, target = rng.standard_normal((150, 12)) * rng.uniform(0.1, 9, (150, 1)), rng.standard_normal((len(tasks), 12))
    if combine == "round_robin" and across != "round_robin":
        with pytest.raises(UsageError, match="across"):
            Similarity(combine, across)
        return
    group = np.unique(tasks, return_inverse=True)[1]
    made = Similarity(combine, across).select(k, x=x, target=target, target_groups=tasks)
    assert made.indices.tolist() == _judge(combine, across, x, target, group, k)
    dense = cosine_similarity(x, target)[made.indices]
    assert made.evidence["nearest"].tolist() == dense.argmax(1).tolist()
    np.testing.assert_allclose(made.evidence["cosine"], dense.max(1), atol=1e-6)
