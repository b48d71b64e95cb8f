"""Iterative refinement with callables: weights against a naive version, budgets, garbage that loses, harmless kills."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from llmselect.errors import LlmselectError, UsageError
from llmselect.kernels.reweight import cluster_means, in_cluster_order, next_rows, reweighted
from llmselect.refine import Loop, Steps, refine, rows_per_round
from llmselect.selection import Selection

CLUSTERS, EACH = 6, 150
GARBAGE = {0, 1}  # of the six subjects: a third of the pool
many = settings(max_examples=80)


@cache
def world() -> tuple[Dataset, np.ndarray, np.ndarray, np.ndarray]:
    """A pool of six subjects, an embedding that tells them apart, a quality, the subject of each row."""
    rng = np.random.default_rng(0)
    subject = rng.permutation(np.repeat(np.arange(CLUSTERS), EACH))
    x = 4 * np.eye(CLUSTERS, 8)[subject] + 0.2 * rng.standard_normal((len(subject), 8))
    chats = [[{"role": "user", "content": f"{s} question {i}"},
              {"role": "assistant", "content": f"garbage {i}" if s in GARBAGE else f"answer {i}"}]
             for i, s in enumerate(subject)]  # fmt: skip
    pool = Dataset.from_dict({"id": [f"row{i}" for i in range(len(subject))], "messages": chats})
    return pool, x, rng.standard_normal(len(subject)), subject


def train(at, rows):
    return {"rows": len(rows), "round": at.number}


def generate(at, prompts):
    return [f"{at.trained['rows']}: {prompt[-1]['content']}" for prompt in prompts]


def score(at, prompts, gold, answers):
    """A reward model that likes answers and dislikes garbage; a little noise that depends on the row."""
    assert all(a == f"{at.trained['rows']}: {p[-1]['content']}" for a, p in zip(answers, prompts, strict=True))
    return [(-1.0 if g.startswith("garbage") else 1.0) + int(g.split()[1]) % 7 / 50 for g in gold]


STEPS = Steps(train, generate, score)
LOOP = Loop(rounds=4, clusters=CLUSTERS)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


# The parts


def naive(weights, means, update, temperature):
    """The update, row by row in plain Python."""
    known = [j for j, s in enumerate(means) if s == s]
    if not known:
        return list(weights)
    average = sum(means[j] for j in known) / len(known)
    spread = (sum((means[j] - average) ** 2 for j in known) / len(known)) ** 0.5
    new = {}
    for j in known:
        z = (means[j] - average) / spread if spread > 0 else 0.0
        new[j] = {"exp": weights[j] * 2.718281828459045 ** (z / temperature), "softmax": 2.718281828459045 ** (z / temperature),
                  "paper": weights[j] * max(means[j], 0.0)}[update]  # fmt: skip
    total, mass = sum(new.values()), sum(weights[j] for j in known)
    out = [new[j] / total * mass if j in new and total > 0 else w for j, w in enumerate(weights)]
    return [w / sum(out) for w in out]


@many
@given(
    weights=st.lists(st.floats(0.01, 1), min_size=1, max_size=9),
    update=st.sampled_from(["exp", "paper", "softmax"]),
    temperature=st.floats(0.2, 5),
    data=st.data(),
)
def test_the_update_is_the_formula(weights, update, temperature, data):
    weights = np.array(weights) / sum(weights)
    score = st.one_of(st.just(float("nan")), st.integers(-40, 40).map(lambda i: i / 8))
    means = np.array(data.draw(st.lists(score, min_size=len(weights), max_size=len(weights))))
    found = reweighted(weights, means, update, temperature)
    np.testing.assert_allclose(found, naive(weights.tolist(), means.tolist(), update, temperature), rtol=1e-9, atol=1e-15)
    assert found.sum() == pytest.approx(1) and (found >= 0).all()
    np.testing.assert_allclose(found[np.isnan(means)], weights[np.isnan(means)])


def test_updates_by_hand():
    weights, means = np.array([0.2, 0.2, 0.6]), np.array([1.0, -1.0, np.nan])
    e = np.exp(1)  # z = ±1
    np.testing.assert_allclose(reweighted(weights, means, "exp"), [0.4 * e / (e + 1 / e), 0.4 / e / (e + 1 / e), 0.6])
    np.testing.assert_allclose(reweighted(weights, means, "paper"), [0.4, 0.0, 0.6])
    np.testing.assert_allclose(reweighted(weights, np.array([-1.0, -2, -3]), "paper"), weights)
    uneven = np.array([0.1, 0.3, 0.6])
    np.testing.assert_allclose(reweighted(uneven, means, "softmax"), [0.4 * e / (e + 1 / e), 0.4 / e / (e + 1 / e), 0.6])
    np.testing.assert_allclose(reweighted(uneven, np.full(3, 0.1 + 0.2), "exp"), uneven)
    extreme = reweighted(weights, np.array([0.0, 1.0, 2.0]), "exp", 1e-3)
    np.testing.assert_allclose(extreme, [0, 0, 1], atol=1e-9)


def test_means_leave_out_what_has_no_score_and_refuse_infinity():
    found = cluster_means(np.array([0, 0, 2, 2, 3]), np.array([1.0, 2.0, np.nan, 5.0, np.nan]), 4)
    np.testing.assert_array_equal(found, [1.5, np.nan, 5.0, np.nan])
    with pytest.raises(LlmselectError, match="answer 1 is infinite"):
        cluster_means(np.array([0, 0]), np.array([1.0, np.inf]), 1)


@many
@given(budget=st.integers(1, 500), rounds=st.integers(1, 12))
def test_rounds_sum_to_the_budget(budget, rounds):
    if budget < rounds:
        with pytest.raises(UsageError, match="fewer rounds"):
            rows_per_round(budget, rounds)
        return
    share = rows_per_round(budget, rounds)
    assert sum(share) == budget and len(share) == rounds and max(share) - min(share) <= 1


def test_rounds_continue_the_order_of_each_cluster():
    rng = np.random.default_rng(1)
    label, value, keys = rng.integers(0, 3, 60), rng.standard_normal(60), rng.permutation(60).astype(np.uint64)
    order, taken, drawn = in_cluster_order(label, value, keys), np.zeros(3, np.int64), []
    for share in ([3, 0, 2], [1, 4, 2]):
        drawn.append(next_rows(order, label, taken, np.array(share), keys))
        assert np.bincount(label[drawn[-1]], minlength=3).tolist() == share
        taken += share
    for c in range(3):
        best = [r for r in np.argsort(-value) if label[r] == c][: taken[c]]
        assert set(np.concatenate(drawn)[label[np.concatenate(drawn)] == c]) == set(best)


# The loop


def garbage_share(made: Selection, subject: np.ndarray) -> tuple[list[float], list[float]]:
    """Its share of the weight and of the new rows in each round."""
    rounds, cluster, of = made.provenance["report"]["rounds"], made.evidence["cluster"], made.evidence["round"]
    bad = {int(c) for c, s in zip(cluster, subject[made.indices], strict=True) if s in GARBAGE}
    weight = [sum(one["weights"][c] for c in bad) for one in rounds]
    rows = [np.isin(subject[made.indices[of == r]], list(GARBAGE)).mean() for r in range(1, len(rounds) + 1)]
    return weight, rows


@pytest.mark.parametrize("with_quality", [True, False])
def test_garbage_loses_weight_and_rows_in_every_round(tmp_path, with_quality):
    pool, x, quality, subject = world()
    loop = Loop(rounds=4, clusters=CLUSTERS, temperature=3.0)
    made = refine(pool, x, 241, loop, STEPS, tmp_path, quality=quality if with_quality else None)
    weight, rows = garbage_share(made, subject)
    assert weight[0] == pytest.approx(1 / 3) and rows[0] == pytest.approx(1 / 3, abs=0.02)
    assert (np.diff(weight) < 0).all() and (np.diff(rows) < 0).all() and rows[-1] < 0.1
    assert len(made) == 241 == len(set(made.indices.tolist()))
    assert np.bincount(made.evidence["round"])[1:].tolist() == [61, 60, 60, 60]
    report = made.provenance["report"]
    assert report["sizes"] == [EACH] * CLUSTERS and [sum(r["rows"]) for r in report["rounds"]] == [61, 60, 60, 60]
    assert report["rounds"][0]["scored"] == [8] * CLUSTERS and "mean_score" not in report["rounds"][-1]
    assert list(made.ids) == [f"row{i}" for i in made.indices]
    if with_quality:
        chosen = quality[made.indices]
        assert chosen.mean() > quality.mean() + 0.3


def test_weights_rows_and_means_are_what_a_plain_loop_gives(tmp_path):
    pool, x, quality, _ = world()
    made = refine(pool, x, 100, Loop(rounds=3, clusters=CLUSTERS, probe=3, temperature=2.0), STEPS, tmp_path, quality=quality)
    label = np.load(tmp_path / "labels.npy")
    weights = np.full(CLUSTERS, 1 / CLUSTERS)
    for number, told in enumerate(made.provenance["report"]["rounds"], 1):
        np.testing.assert_allclose(told["weights"], weights)
        share = [np.sum(label[made.indices[made.evidence["round"] == number]] == c) for c in range(CLUSTERS)]
        assert share == told["rows"] and np.abs(np.array(share) - sum(share) * weights).max() < 1
        if number == 3:
            break
        asked = json.loads((tmp_path / f"round-{number}" / "generate.json").read_text())["value"]["rows"]
        so_far = made.indices[made.evidence["round"] <= number]
        assert set(asked) <= set(so_far.tolist()) and np.bincount(label[asked], minlength=CLUSTERS).tolist() == [3] * CLUSTERS
        gold = [pool[i]["messages"][-1]["content"] for i in asked]
        each = [(-1.0 if g.startswith("garbage") else 1.0) + int(g.split()[1]) % 7 / 50 for g in gold]
        means = [float(np.mean([s for s, i in zip(each, asked, strict=True) if label[i] == c])) for c in range(CLUSTERS)]
        np.testing.assert_allclose(told["mean_score"], means)
        weights = np.array(naive(weights.tolist(), means, "exp", 2.0))


def test_clusters_without_a_score_keep_their_weight(tmp_path):
    pool, x, _, subject = world()
    halves = Steps(train, generate, lambda at, prompts, gold, answers:
                   [float("nan") if int(p[-1]["content"][0]) < 3 else s
                    for p, s in zip(prompts, score(at, prompts, gold, answers), strict=True)])  # fmt: skip
    made = refine(pool, x, 60, LOOP, halves, tmp_path)
    silent = {int(c) for c, s in zip(made.evidence["cluster"], subject[made.indices], strict=True) if s < 3}
    for one in made.provenance["report"]["rounds"][1:]:
        changed = {c for c, w in enumerate(one["weights"]) if abs(w - 1 / CLUSTERS) > 1e-9}
        assert changed == set(range(CLUSTERS)) - silent and sum(one["weights"]) == pytest.approx(1)
    deaf = Steps(train, generate, score, fits=lambda messages: False)
    made = refine(pool, x, 72, LOOP, deaf, tmp_path / "deaf")
    assert all(one["weights"] == [1 / CLUSTERS] * CLUSTERS for one in made.provenance["report"]["rounds"])
    assert sorted(np.bincount(subject[made.indices])) == [12] * CLUSTERS


def test_small_clusters_give_all_they_have_and_excluded_rows_nothing(tmp_path):
    pool, x, quality, subject = world()
    some = np.flatnonzero(subject == 5)[:140]
    made = refine(pool, x, 700, LOOP, STEPS, tmp_path, quality=quality, exclude=some)
    assert len(made) == 700 and not set(made.indices.tolist()) & set(some.tolist())
    everything = refine(pool, x, "100%", Loop(rounds=2, clusters=4), STEPS, tmp_path / "all")
    assert sorted(everything.indices.tolist()) == list(range(len(pool)))


def test_a_seed_repeats_two_differ_and_clusters_come_by_silhouette(tmp_path):
    pool, x, quality, _ = world()
    loop = Loop(rounds=2)
    a, b = (refine(pool, x, 90, loop, STEPS, tmp_path / n, quality=quality, seed=3) for n in "ab")
    c = refine(pool, x, 90, loop, STEPS, tmp_path / "c", quality=quality, seed=4)
    assert (a.indices == b.indices).all() and contents(tmp_path / "a") == contents(tmp_path / "b")
    assert set(a.indices.tolist()) != set(c.indices.tolist())
    tried = a.provenance["report"]["silhouettes"]
    assert len(a.provenance["report"]["sizes"]) == int(max(tried, key=tried.__getitem__))


# Mistakes


def test_mistakes_are_told(tmp_path):
    pool, x, quality, _ = world()
    refine(pool, x, 60, LOOP, STEPS, tmp_path)
    with pytest.raises(LlmselectError, match=r"refined otherwise:\n  rows: 60 -> 61\nDelete it"):
        refine(pool, x, 61, LOOP, STEPS, tmp_path)
    with pytest.raises(UsageError, match="budget in tokens"):
        refine(pool, x, {"tokens": 100}, LOOP, STEPS, tmp_path)
    with pytest.raises(UsageError, match="one row for each of the 900 rows"):
        refine(pool, x[:5], 60, LOOP, STEPS, tmp_path)
    quality = np.where(np.arange(len(pool)) == 7, np.nan, quality)
    with pytest.raises(LlmselectError, match=r"no finite score.*\[7\]"):
        refine(pool, x, 60, LOOP, STEPS, tmp_path, quality=quality)
    with pytest.raises(LlmselectError, match=r"'generate' gave 0 values for 15 rows"):
        refine(pool, x, 60, LOOP, Steps(train, lambda at, prompts: [], score), tmp_path / "few")
    for wrong in ({"rounds": 0}, {"probe": 0}, {"clusters": 0}, {"temperature": 0}, {"tau": -1}):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            Loop(**wrong)
