"""N-gram counts, importance resampling and its kernels against plain loops."""

from __future__ import annotations

import hashlib
import itertools
import math
import re

import numpy as np
import pytest
import rows
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array
from test_stages import recipe_of

import tiny
from llmselect.chat import ChatEncoder
from llmselect.compare import compare
from llmselect.engine.extraction import extract
from llmselect.errors import LlmselectError, UsageError
from llmselect.extractors.ngram import Ngram
from llmselect.extractors.tokens import Tokens
from llmselect.kernels.gumbel import effective_size, gumbel_topk, kappa_of
from llmselect.kernels.keyed import Keyed
from llmselect.kernels.ngrams import kl_reduction
from llmselect.prepare import prepare
from llmselect.report.contents import contents
from llmselect.selection import Selection
from llmselect.selectors.dsir import Dsir
from llmselect.stages import Run, extract_stage, select_stage
from llmselect.store import FeatureStore

SEEDS = st.integers(0, 2**32 - 1)


def counts(seed: int, n: int = 40, width: int = 12, most: int = 9) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.integers(0, most, (n, width)) * (rng.random((n, width)) < 0.5)).astype(np.float32)


def words(text: str) -> list[str]:
    """Maximal runs of word characters, or of what is neither word nor space, character by character."""
    found, last = [], "space"
    for c in text.lower():
        kind = "space" if c.isspace() else "word" if c.isalnum() or c == "_" else "other"
        if kind != "space":
            found[-1:] = [found[-1] + c] if kind == last else [*found[-1:], c]
        last = kind
    return found


def naive_counts(text: str, buckets: int, order: int) -> list[int]:
    out, parts = [0] * buckets, words(text)
    for n, i in itertools.product(range(1, order + 1), range(len(parts))):
        if i + n <= len(parts):
            out[int(hashlib.sha256(" ".join(parts[i : i + n]).encode("utf-8")).hexdigest(), 16) % buckets] += 1
    return out


TEXT = st.text(st.sampled_from("ab C_9 é.,!?'\n世"), max_size=30)


@settings(max_examples=150)
@given(texts=st.lists(TEXT, min_size=2, max_size=4), buckets=st.sampled_from([1, 7, 10_000]), order=st.integers(1, 3))
def test_counts_are_those_of_the_text(texts, buckets, order):
    chat = [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(texts)]
    for scope, kept in (("all", texts), ("prompt", texts[0::2]), ("response", texts[1::2])):
        made = Ngram(model="m", buckets=buckets, order=order, scope=scope).texts([chat, chat])["value"]
        expected = naive_counts("\n".join(kept), buckets, order)
        assert made.scipy().toarray().tolist() == [expected, expected]
        assert made.data.all()


def test_a_known_bucket():
    made = Ngram(model="m").texts([[{"role": "user", "content": "Alice"}]])["value"].scipy()
    digest = "2bd806c97f0e00af1a1fc3328fa763a9269723c8db8fac4f93af71db186d6e90"  # SHA-256 of "alice"
    assert made.indices.tolist() == [int(digest, 16) % 10_000]


def test_the_feature_needs_no_tokens_and_reads_back(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(ChatEncoder, "encode", lambda *a: pytest.fail("rows were tokenized"))
    pool, target = rows.pool(30), rows.target()
    store = FeatureStore(tmp_path)
    extract(pool, store, {"ngram": Ngram(model=str(tiny_model), buckets=50)}, target=target, shard_rows=8)
    expected = [naive_counts("\n".join(m["content"] for m in row), 50, 2) for row in pool["messages"]]
    assert store["ngram"][:].toarray().tolist() == expected
    dense = Dsir().select(6, x=np.array(expected, float), target=store["ngram@target"], ids=pool["id"])
    assert Dsir().select(6, x=store["ngram"], target=store["ngram@target"]).indices.tolist() == dense.indices.tolist()


def test_the_feature_shares_a_pass_with_others(tiny_model, tmp_path):
    pool, made = rows.pool(12), {}
    for folder, features in (("both", (Ngram, Tokens)), ("ngram", (Ngram,)), ("tokens", (Tokens,))):
        made[folder] = FeatureStore(tmp_path / folder)
        extract(pool, made[folder], {cls.name: cls(model=str(tiny_model)) for cls in features}, shard_rows=5)
    assert (made["both"]["ngram"][:] != made["ngram"]["ngram"][:]).nnz == 0 < made["ngram"]["ngram"][:].nnz
    assert np.array_equal(made["both"]["tokens.total"][:], made["tokens"]["tokens.total"][:])


def log_weights(x: np.ndarray, target: np.ndarray, prior: float | None) -> list[float]:
    """Row by row and bucket by bucket; without a prior the published sums."""
    x, target = x.astype(float), target.astype(float)
    pool, wanted = x.sum(0, dtype=float), target.sum(0, dtype=float)
    out = []
    for row in x:
        total = 0.0
        for b, c in enumerate(row):
            q = pool[b] / pool.sum()
            if prior is None:
                total += c * (math.log(wanted[b] / wanted.sum() + 1e-8) - math.log(q + 1e-8))
            elif c:
                total += c * (math.log((wanted[b] + prior * q) / (wanted.sum() + prior)) - math.log(q))
        out.append(total / (1 if prior is None else max(1, row.sum())))
    return out


@settings(max_examples=60)
@given(seed=SEEDS, prior=st.sampled_from([0.5, 2000.0]), k=st.integers(1, 40), sparse=st.booleans())
def test_weights_are_those_of_the_formula(seed, prior, k, sparse):
    x, target = counts(seed), counts(seed + 1, 3)
    given_x = csr_array(x) if sparse else x
    for method, expected in ((Dsir(prior=prior), prior), (Dsir(parity=True, prior=prior), None)):
        made = method.select(k, x=given_x, target=target)
        assert np.allclose(made.scores, log_weights(x, target, expected), atol=1e-9)
        assert np.array_equal(made.evidence["ngrams"], x[made.indices].sum(1))


def test_published_form_draws_by_weight_and_leaves_short_rows_to_the_end():
    x, target = counts(3, 60, most=60), counts(4, 2)
    made = Dsir(parity=True).select(60, x=x, target=target, seed=9)
    long = np.ceil(x.sum(1) / 2) >= 100
    assert 5 < long.sum() < 55
    noisy = np.array(log_weights(x, target, None)) - np.log(-np.log(Keyed(9, np.arange(60, dtype=np.uint64)).uniform("gumbel")))
    expected = [*sorted(np.flatnonzero(long), key=lambda i: -noisy[i]), *sorted(np.flatnonzero(~long), key=lambda i: -noisy[i])]
    assert made.indices.tolist() == expected


MASK = 2**64 - 1


def drawn(seed: int, row: int) -> float:
    """The uniform number of a row, in integers of Python's."""

    def mix(x: int) -> int:
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & MASK
        x = (x ^ x >> 27) * 0x94D049BB133111EB & MASK
        return x ^ x >> 31

    stream = int.from_bytes(hashlib.blake2b(f"{seed}/gumbel".encode(), digest_size=8).digest(), "big")
    return ((mix(mix(row + 0x9E3779B97F4A7C15 & MASK) ^ stream) >> 12) + 0.5) * 2.0**-52


def published(texts: list[str], target: list[str], seed: int, buckets: int) -> tuple[list[float], list[int]]:
    """DSIR from text to order as its paper and package have it: log w of every row, the rows of 100 words or more as drawn."""
    split = lambda text: re.findall(r"\w+|[^\w\s]+", text.lower())  # noqa: E731 - NLTK's wordpunct_tokenize
    hashed = lambda gram: int(hashlib.sha256(gram.encode()).hexdigest(), 16) % buckets  # noqa: E731
    grams = lambda words: [hashed(g) for g in [*words, *(f"{a} {b}" for a, b in itertools.pairwise(words))]]  # noqa: E731
    rows, wanted = [grams(split(text)) for text in texts], [b for text in target for b in grams(split(text))]
    every = [b for row in rows for b in row]
    log = lambda b, seen: math.log(seen.count(b) / len(seen) + 1e-8)  # noqa: E731
    ratio = {b: log(b, wanted) - log(b, every) for b in set(every)}
    weights = [sum(ratio[b] for b in row) for row in rows]
    noisy = {i: w - math.log(-math.log(drawn(seed, i))) for i, w in enumerate(weights) if len(split(texts[i])) >= 100}
    return weights, sorted(noisy, key=lambda i: -noisy[i])


SOLVE = "Solve 3x + 4 = 19: don't GUESS, subtract 4... then divide by 3 (x = 5)! "  # 24 words
STORY = "The naïve fox_1 said 'Größe'; THEN it ran home, and the 2nd fox didn't follow. "  # 21 words


@pytest.mark.parametrize("buckets", [10_000, 37])  # 37: n-grams share buckets
def test_parity_is_the_published_formula_from_text_to_order(buckets):
    texts = [5 * SOLVE, 5 * STORY, 2 * SOLVE + 3 * STORY, "word " * 100, "word " * 99, 3 * SOLVE, 25 * "w! " + 4 * STORY]
    texts += [texts[0].upper(), texts[0] + "solve"]  # as heavy, and nearly: noise decides which comes first
    assert [len(words(text)) for text in texts] == [120, 105, 111, 100, 99, 72, 134, 120, 121]
    target = ["Solve 7x = 21: divide by 7 (x = 3)!", "Don't guess; solve."]
    chats = lambda rows: [[{"role": "user", "content": text}] for text in rows]  # noqa: E731
    feature = Ngram(model="m", buckets=buckets)
    x, wanted = (feature.texts(chats(rows))["value"].scipy() for rows in (texts, target))
    orders = set()
    for seed in range(25):
        weights, order = published(texts, target, seed, buckets)
        made = Dsir(parity=True).select(7, x=x, target=wanted.toarray(), seed=seed)
        np.testing.assert_allclose(made.scores, weights, rtol=1e-9)
        assert made.indices.tolist() == order
        orders.add(tuple(order))
    assert len(orders) > 1


def test_length_counts_in_the_published_form_only():
    x, target = counts(5), counts(6, 3)
    x[1] = 3 * x[0]
    free, published = (Dsir(parity=p).select(6, x=x, target=target).scores for p in (False, True))
    assert free[1] == pytest.approx(free[0])
    assert published[1] == pytest.approx(3 * published[0])


def test_a_row_without_ngrams_comes_last():
    x = counts(7)
    x[11] = 0
    assert [Dsir().select(40, x=x, target=counts(8, 2), seed=s).indices[-1] for s in range(5)] == [11] * 5


@settings(max_examples=150)
@given(seed=SEEDS, n=st.integers(1, 60), share=st.floats(0.01, 0.99), scale=st.sampled_from([1e-3, 1.0, 300.0]))
def test_kappa_gives_the_wanted_effective_size(seed, n, share, scale):
    weights = scale * np.random.default_rng(seed).standard_normal(n)
    wanted = 1 + share * (n - 1)
    assert effective_size(weights, kappa_of(weights, wanted)) == pytest.approx(wanted, rel=1e-6)
    assert effective_size(weights, 0.0) == pytest.approx(n)


def test_kappa_of_ties_and_equal_weights():
    assert kappa_of(np.zeros(9), 3) == 0 == kappa_of(np.arange(4.0), 4) == kappa_of(np.zeros(0), 1)
    assert effective_size(np.array([1.0, 1, 1, 0]), kappa_of(np.array([1.0, 1, 1, 0]), 2)) == pytest.approx(3)


@pytest.mark.parametrize("k", [1, 3, 12])
def test_the_draw_is_worth_twice_the_budget(k):
    x, target = counts(11, 60), counts(12, 3)
    keys = np.arange(60, dtype=np.uint64)
    made = Dsir().select(k, x=x, target=target, seed=4)
    kappa = kappa_of(made.scores, 2 * k)
    assert effective_size(made.scores, kappa) == pytest.approx(2 * k, rel=1e-6)
    assert made.indices.tolist() == gumbel_topk(made.scores, k, Keyed(4, keys), kappa).tolist()
    assert made.indices.tolist() != gumbel_topk(made.scores, 60, Keyed(4, keys), 0.0)[:k].tolist()


def test_gumbel_topk_draws_without_replacement_by_weight():
    weights, draws = np.array([1.0, 2.0, 4.0, 8.0]), 20_000
    seen = np.zeros((4, 4))
    for seed in range(draws):
        i, j = gumbel_topk(np.log(weights), 2, Keyed(seed, np.arange(4, dtype=np.uint64)))
        seen[i, j] += 1 / draws
    for i, j in itertools.permutations(range(4), 2):
        expected = weights[i] / 15 * weights[j] / (15 - weights[i])
        assert seen[i, j] == pytest.approx(expected, abs=5 * math.sqrt(expected / draws))


@settings(max_examples=60)
@given(seed=SEEDS, k=st.integers(1, 40), prior=st.sampled_from([1.0, 500.0]), sparse=st.booleans())
def test_kl_reduction_is_that_of_the_formula(seed, k, prior, sparse):
    x, target = counts(seed), counts(seed + 1, 3)
    chosen = np.random.default_rng(seed).permutation(40)[:k]
    base = (x.sum(0, dtype=float) + 1) / (x.sum(dtype=float) + 12)
    t = target.sum(0, dtype=float) / target.sum(dtype=float)

    def divergence(c: np.ndarray) -> float:
        q = [(c[b] + prior * base[b]) / (c.sum() + prior) for b in range(12)]
        return sum(t[b] * math.log(t[b] / q[b]) for b in range(12) if t[b])

    expected = divergence(x.sum(0, dtype=float)) - divergence(x[chosen].sum(0, dtype=float))
    assert kl_reduction(csr_array(x) if sparse else x, chosen, target, prior) == pytest.approx(expected, abs=1e-9)
    assert kl_reduction(x, np.arange(40), target, prior) == 0


def test_the_selection_is_nearer_to_the_target_than_the_pool():
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.poisson(rng.dirichlet(np.full(50, 0.3)) * 80, (300, 50)) for _ in range(4)]).astype(float)
    target = x[:8]
    gains = [kl_reduction(x, Dsir().select(60, x=x, target=target, seed=s).indices, target) for s in range(5)]
    chance = [kl_reduction(x, rng.permutation(1200)[:60], target) for _ in range(5)]
    assert min(gains) > 0.3 > 0.1 > max(chance)


def test_mistakes_are_named():
    with pytest.raises(LlmselectError, match="target"):
        Dsir().select(2, x=counts(0), target=np.zeros((2, 12)))
    with pytest.raises(LlmselectError, match=r"negative.*\[3\]"):
        Dsir().select(2, x=np.where(np.arange(9)[:, None] == 3, -1.0, 1.0) * np.ones((9, 12)), target=counts(1, 2))
    with pytest.raises(LlmselectError, match="no row of the pool"):
        Dsir().select(2, x=np.zeros((5, 12)), target=counts(1, 2))
    for wrong in ({"prior": 0}, {"kappa": -1.0}):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            Dsir(**wrong)
    for wrong in ({"buckets": 0}, {"order": 0}):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            Ngram(model="m", **wrong)


def test_compare_and_report_tell_it_of_any_selection(tmp_path, tiny_model):
    features, methods = {"words": {"extractor": "ngram", "buckets": 500}}, {"d": {"selector": "dsir", "x": "words"}}
    run = Run(recipe_of(tmp_path, tiny_model, tiny.chats(40), features=features,
                        methods={**methods, "random": {"selector": "random"}}))  # fmt: skip
    for stage in (prepare, extract_stage, select_stage):
        stage(run)
    told, target = compare([run.folder])["selections"], run.store["words@target"][:].toarray()
    page = contents(run, 4000)
    for name in ("d", "random"):
        chosen = Selection.load(run.folder / "selections" / name / "seed-0").indices
        expected = kl_reduction(run.store["words"][:].toarray(), chosen, target)
        assert told[f"run/{name}/seed-0"]["kl_reduction"] == pytest.approx(expected, abs=1e-9) and abs(expected) > 1e-4
        assert next(one for one in page["views"] if one["method"] == name)["kl_reduction"] == pytest.approx(expected, rel=1e-5)
