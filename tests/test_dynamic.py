"""Schedules: the laws of each method, against naive versions written from the formulae."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from math import ceil
from pathlib import Path

import numpy as np
import pytest
import rows as pools
from hypothesis import given
from hypothesis import strategies as st

import tiny
from llmselect import registry
from llmselect.dynamic.schedules._base import Epoch, annealing
from llmselect.dynamic.schedules.infobatch import InfoBatch
from llmselect.dynamic.schedules.rs2 import Rs2
from llmselect.dynamic.schedules.seta import SeTa
from llmselect.dynamic.schedules.static import Static
from llmselect.dynamic.state import EpochState
from llmselect.errors import LlmselectError, UsageError
from llmselect.kernels.intervals import intervals
from llmselect.kernels.keyed import Keyed, keys_of
from llmselect.selectors.random import Random

IDS = [f"row {i}" for i in range(37)]
ALL = [Rs2(5), Rs2(5, replacement=True), InfoBatch(), SeTa(), Static(), Static((3, 1, 30), (1.0, 2.0, 3.0))]


def some_losses(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).gamma(2.0, 1.0, n).astype(np.float32)


def rows(schedule, epoch, epochs, ids, losses=None, seed=0):
    return schedule.rows(epoch, epochs, len(ids), Keyed(seed, keys_of(ids, len(ids))), losses)


def test_every_schedule_is_registered():
    assert {"rs2", "infobatch", "seta", "static"} <= set(registry.schedules.names())
    assert registry.schedules.get("rs2") is Rs2


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 12), st.integers(0, 3))
def test_rs2_visits_every_row_once_per_pass(n, k, epochs, seed):
    k = min(k, n)
    made = Rs2(k).materialise(epochs, n=n, seed=seed)
    assert [len(e.indices) for e in made] == [k] * epochs == [Rs2(k).size(e, epochs, n) for e in range(epochs)]
    walk = np.concatenate([e.indices for e in made])
    for start in range(0, len(walk), n):
        part = walk[start : start + n]
        assert len(np.unique(part)) == len(part)
    assert all((e.weights == 1).all() for e in made)


def test_rs2_reshuffles_every_pass_and_draws_anew_with_replacement():
    first, second = (np.concatenate([e.indices for e in Rs2(10).materialise(8, n=40)])[p] for p in (slice(40), slice(40, 80)))
    assert sorted(first) == sorted(second) == list(range(40)) and (first != second).any()
    made = Rs2(10, replacement=True).materialise(400, n=40)
    assert all(len(set(e.indices.tolist())) == 10 for e in made)
    seen = np.bincount(np.concatenate([e.indices for e in made]), minlength=40)
    assert abs(seen - 100).max() < 5 * np.sqrt(400 * 0.25 * 0.75)  # each row is in 100 of 400 epochs, binomially
    assert len(np.unique(np.concatenate([e.indices for e in made[:4]]))) < 40


@pytest.mark.parametrize("schedule", ALL, ids=lambda s: f"{s.name}-{s!r}"[:24])
@pytest.mark.parametrize("epoch", [0, 2, 7])
def test_rows_follow_ids_not_the_order_of_the_pool(schedule, epoch):
    losses, order = some_losses(37), np.random.default_rng(1).permutation(37)
    moved = schedule
    if schedule.name == "static" and schedule.indices:
        moved = Static(tuple(int(np.flatnonzero(order == i)[0]) for i in schedule.indices), schedule.weights)
    a = rows(schedule, epoch, 8, IDS, losses)
    b = rows(moved, epoch, 8, [IDS[i] for i in order], losses[order])
    assert [IDS[i] for i in a.indices] == [IDS[order[i]] for i in b.indices]
    np.testing.assert_array_equal(a.weights, b.weights)
    again = rows(schedule, epoch, 8, IDS, losses)
    np.testing.assert_array_equal(a.indices, again.indices)
    other = rows(schedule, epoch, 8, IDS, losses, seed=1)
    assert a.indices.tolist() != other.indices.tolist()
    assert len(a.indices) <= schedule.size(epoch, 8, 37)


def test_infobatch_is_the_formula():
    losses, r = some_losses(37), 0.4
    found = rows(InfoBatch(r), 3, 8, IDS, losses)
    weight = dict(zip(found.indices.tolist(), found.weights, strict=True))
    draws = Keyed(0, keys_of(IDS, 37)).uniform("infobatch/3")
    mean = sum(map(float, losses)) / 37
    for i in range(37):
        if losses[i] >= mean:
            assert weight[i] == 1
        elif draws[i] < r:
            assert i not in weight
        else:
            assert weight[i] == pytest.approx(1 / 0.6)
    assert 0 < 37 - len(weight) < (losses < mean).sum()


def test_infobatch_keeps_the_expected_gradient():
    losses, gradients = some_losses(37), np.random.default_rng(2).normal(size=(37, 3))
    total = np.zeros(3)
    draws = 4000
    for seed in range(draws):
        found = rows(InfoBatch(0.5), 1, 8, IDS, losses, seed)
        total += found.weights @ gradients[found.indices]
    low = gradients[losses < losses.mean()]
    spread = np.sqrt((low**2).sum(0) / draws)  # a dropped or doubled gradient has variance g²
    assert (abs(total / draws - gradients.sum(0)) < 4 * spread).all()


@pytest.mark.parametrize("losses", [None, np.full(37, np.nan, np.float32)])
def test_without_losses_all_rows_are_used(losses):
    assert sorted(rows(InfoBatch(), 0, 8, IDS, losses).indices) == list(range(37))
    assert len(rows(SeTa(keep=0.5), 0, 8, IDS, losses).indices) == 19


def test_rows_without_a_finite_loss_stay():
    losses = some_losses(37)
    losses[[4, 9]] = np.nan, np.inf
    for seed in range(20):
        assert {4, 9} <= set(rows(InfoBatch(0.9), 1, 8, IDS, losses, seed).indices.tolist())
        assert {4, 9} <= set(rows(SeTa(keep=1.0, alpha=0.1), 1, 8, IDS, losses, seed).indices.tolist())


def test_annealing_epochs():
    assert [annealing(e, 8, 0.125) for e in range(8)] == [False] * 7 + [True]
    assert [annealing(e, 10, 0.3) for e in range(10)] == [False] * 7 + [True] * 3
    assert [annealing(e, 3, 0.125) for e in range(3)] == [False, False, True] and not annealing(7, 8, 0.0)
    losses = some_losses(37)
    everything = rows(InfoBatch(), 7, 8, IDS, losses)
    assert sorted(everything.indices) == list(range(37)) and (everything.weights == 1).all()
    assert len(rows(InfoBatch(), 6, 8, IDS, losses).indices) < 37
    annealed, blind = rows(SeTa(keep=0.8, alpha=0.3), 7, 8, IDS, losses), rows(SeTa(keep=0.8), 7, 8, IDS, None)
    np.testing.assert_array_equal(annealed.indices, blind.indices)
    assert len(annealed.indices) == ceil(0.8 * 37)


def naive_groups(values: np.ndarray, k: int) -> np.ndarray:
    """Lloyd's algorithm over all pairs of value and centroid, in Python floats."""
    ordered = sorted(map(float, values))
    centroids = sorted({ordered[int((j + 0.5) / k * len(ordered))] for j in range(k)})
    label: list[int] = []
    while True:
        new = [min(range(len(centroids)), key=lambda c: (abs(v - centroids[c]), c)) for v in map(float, values)]
        used = sorted(set(new))
        new = [used.index(c) for c in new]
        if new == label:
            return np.array(new)
        label = new
        centroids = [np.mean([v for v, c in zip(values, label, strict=True) if c == g]) for g in range(len(used))]


@given(st.lists(st.integers(0, 60), min_size=1, max_size=40), st.integers(1, 12))
def test_intervals_are_naive_k_means(values, k):
    found = intervals(np.array(values, float), k)
    np.testing.assert_array_equal(found, naive_groups(np.array(values, float), k))
    assert set(found) == set(range(found.max() + 1)) and found.max() < k


def test_groups_far_apart_are_found():
    values = np.r_[np.full(6, 1.0), np.full(17, 2.0), np.full(7, 9.0)]
    np.testing.assert_array_equal(intervals(values, 3), np.repeat([0, 1, 2], [6, 17, 7]))
    assert len(intervals(np.zeros(0), 3)) == 0


@pytest.mark.parametrize("alpha", [0.25, 0.5, 1.0])
def test_seta_windows_are_the_naive_ones(alpha):
    ids, losses = [str(i) for i in range(200)], some_losses(200, 5)
    schedule, starts = SeTa(keep=0.9, groups=8, alpha=alpha), []
    for epoch in range(1, 14):
        draws = Keyed(0, keys_of(ids, 200)).uniform(f"seta/{epoch}")
        kept = sorted(range(200), key=lambda i: draws[i])[:180]
        label = naive_groups(losses[kept], 8)
        count, width = label.max() + 1, ceil((label.max() + 1) * alpha)
        start = (epoch - 1) % (count - width + 1)
        expected = [i for i, g in zip(kept, label, strict=True) if start <= g < start + width]
        found = rows(schedule, epoch, 100, ids, losses)
        assert found.indices.tolist() == expected and (found.weights == 1).all()
        starts.append((start, losses[found.indices].mean()))
    if alpha < 1:
        easy, hard = starts[0][1], max(mean for _, mean in starts)
        assert easy < hard and len({s for s, _ in starts}) == count - width + 1


def test_static_is_the_selection():
    selection = Random().select(9, n=37, ids=IDS, seed=4)
    made = Static.of(selection).materialise(3, ids=IDS)
    assert all(set(e.indices) == set(selection.indices) and (e.weights == 1).all() for e in made)
    assert made[0].indices.tolist() != made[1].indices.tolist()
    weighted = Static((5, 2), (0.5, 2.0)).materialise(1, n=9)[0]
    assert dict(zip(weighted.indices.tolist(), weighted.weights, strict=True)) == {5: 0.5, 2: 2.0}
    with pytest.raises(UsageError, match="a pool of 37, but this one has 36"):
        Static.of(selection).materialise(1, n=36)


def test_wrong_settings_are_refused():
    for make, said in [
        (lambda: InfoBatch(r=1.0), r"r: 1.0 is not in \[0, 1\)"),
        (lambda: SeTa(keep=0), r"keep: 0 is not in \(0, 1\]"),
        (lambda: SeTa(groups=0), "groups: 0 must be at least 1"),
        (lambda: Rs2({"tokens": 5}), "rs2 counts rows"),
        (lambda: Rs2(50).materialise(1, n=9), "a budget of 50 rows is more than the 9 rows"),
        (lambda: InfoBatch().materialise(2, n=9), "follows the losses of a training"),
        (lambda: Rs2().materialise(2), "give n=, the rows of the pool, or ids="),
        (lambda: Static(()), "at least one row number"),
        (lambda: Static(weights=(1.0,)), "one for each of indices"),
        (lambda: EpochState(Rs2(), epochs=0, n=9), "epochs: 0"),
        (lambda: EpochState(Rs2(), epochs=1, n=9, losses=[1.0]), "disagree"),
    ]:
        with pytest.raises(UsageError, match=said):
            make()


def test_a_saved_state_goes_on_in_the_middle_of_an_epoch():
    a, b = (EpochState(InfoBatch(), epochs=8, ids=IDS, seed=3) for _ in range(2))
    a.begin(0)
    a.record(np.arange(37), some_losses(37))
    a.begin(1)
    a.record(a.indices[:5], np.zeros(5))
    a.record([30], [np.nan])
    assert a.losses[30] == some_losses(37)[30]
    b.restore(a.saved())
    for name in ("indices", "weights", "losses", "before"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    a.begin(2), b.begin(2)
    np.testing.assert_array_equal(a.indices, b.indices)
    with pytest.raises(LlmselectError, match="seed"):
        EpochState(InfoBatch(), epochs=8, ids=IDS, seed=4).restore(a.saved())


def test_a_schedule_that_leaves_no_row_says_so():
    class Nothing(Static):
        def rows(self, *args, **kwargs):
            return Epoch(np.zeros(0, np.int64), np.zeros(0))

    with pytest.raises(LlmselectError, match="'static' leaves no row for epoch 1"):
        EpochState(Nothing(), epochs=1, n=3).begin(0)


def test_steps_of_equal_tokens_follow_a_planned_schedule():
    from llmselect.chat import Encoded
    from llmselect.dynamic.planned import planned_order
    from llmselect.token_steps import schedule

    ids, made = [f"r{i}" for i in range(12)], Rs2(5)
    size = 3  # tokens of every row

    def encode(numbers):
        ones = np.ones(size, bool)
        return [Encoded(np.full(size + 1, n, np.int32), np.r_[False, ones], np.zeros(size + 1, np.int8)) for n in numbers]

    order = planned_order({"name": "rs2", "budget": 5}, 4, ids, 7)
    for tokens, epochs, total in [(None, 4, 60), (70, 1, 70)]:  # a budget of tokens goes on to further epochs
        plan = schedule(12, encode, tokens, 8, 0, 2, epochs, order)
        per_step = [sum(stop - start for _, start, stop in step) for step in plan.steps]
        assert sum(per_step) == plan.tokens == total and all(n == 8 for n in per_step[:-1])
        seen = [plan.numbers[row] for step in plan.steps for row, start, stop in step for _ in range(stop - start)]
        walk = np.concatenate([e.indices for e in made.materialise(5, ids=ids, seed=7)])
        assert seen == np.repeat(walk, size)[:total].tolist()
        assert all(plan.rows[i].ids[0] == n for i, n in enumerate(plan.numbers))


def test_the_token_trainer_refuses_what_it_cannot_plan():
    from llmselect.train import Train, validate

    validate(Train(schedule={"name": "rs2", "budget": "20%"}))
    for settings, said in [
        ({"name": "infobatch"}, "'infobatch' follows the losses of a training.*attach"),
        ({"name": "static", "indices": [1], "weights": [2.0]}, "'static' weighs rows"),
        ({"name": "rs3"}, "unknown schedule 'rs3'. Did you mean 'rs2'?"),
        ({"budget": 5}, "train.schedule.name: missing; one of infobatch, rs2"),
        ({"name": "rs2", "buget": 5}, "buget"),
    ]:
        with pytest.raises(UsageError, match=said):
            validate(Train(schedule=settings))


def test_the_token_trainer_trains_on_rs2(tmp_path):
    from llmselect.train import Train, finetune

    model, data = str(tiny.save(tmp_path / "model")), pools.pool(6)
    settings = {"batch_tokens": 50, "epochs": 3}
    made = finetune(data, model, tmp_path / "a", Train(**settings, schedule={"name": "rs2", "budget": 2}), seed=0, max_length=96)
    whole = finetune(data, model, tmp_path / "b", Train(**settings), seed=0, max_length=96)
    assert made.tokens * 3 == whole.tokens, "three epochs of two of six rows are one pass"
    again = finetune(data, model, tmp_path / "b", Train(**settings), seed=0, max_length=96)
    assert again == whole
    with pytest.raises(LlmselectError, match="schedule"):
        finetune(data, model, tmp_path / "a", Train(**settings), seed=0, max_length=96)


def test_the_example_of_the_recipe_runs(tmp_path):
    text = (Path(__file__).parents[1] / "recipes/dynamic/README.md").read_text("utf-8")
    (tmp_path / "example.py").write_text(text.split("```python\n")[1].split("```")[0], "utf-8")
    tiny.save(tmp_path / "model")
    with gzip.open(tmp_path / "pool.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"messages": turns}) + "\n" for turns in tiny.chats(12))
    done = subprocess.run([sys.executable, "example.py"], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    said = [line for line in done.stdout.splitlines() if line.startswith("epoch ")]
    assert len(said) == 8 and said[0] == said[7].replace("7", "0", 1) == "epoch 0: 12 of 12 rows, 0 of them with more weight"
    assert not any(" 0 of them" in line for line in said[1:7])
