"""Ensembles against sums of ranks in dictionaries, and the command on a run."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_stages import recipe_of

import tiny
from llmselect.cli_ensemble import ensemble as command
from llmselect.ensemble import ensemble, ensemble_runs
from llmselect.errors import UsageError
from llmselect.kernels.keyed import keys_of
from llmselect.prepare import prepare
from llmselect.selection import Selection
from llmselect.stages import Run, extract_stage, select_stage

SEEDS = st.integers(0, 2**32 - 1)
N = 30
IDS = [f"{i * 7919 % 10007:032x}" for i in range(N)]


def of(rows, ids=IDS) -> Selection:
    return Selection(np.array(rows), N, ids=None if ids is None else [ids[i] for i in rows])


def some(seed: int, count: int, ids=IDS) -> dict[str, Selection]:
    rng = np.random.default_rng(seed)
    return {f"m{i}": of(rng.permutation(N)[: rng.integers(1, N)].tolist(), ids) for i in range(count)}


def naive(made: dict[str, Selection], how: str, ids) -> list[int]:
    """All rows of the union in order."""
    lists = [one.indices.tolist() for one in made.values()]
    union = sorted(set().union(*lists))
    if how == "round_robin":
        order: list[int] = []
        while len(order) < len(union):
            for rows in lists:
                order += [row for row in rows if row not in order][:1]
        return order
    longest = max(map(len, lists))
    points = {row: sum((longest - one.index(row) if how == "borda" else 1 / (61 + one.index(row)))
                       for one in lists if row in one) for row in union}  # fmt: skip
    keys = keys_of(ids, N)
    return sorted(union, key=lambda row: (-np.float32(points[row]), keys[row]))


@settings(max_examples=150)
@given(seed=SEEDS, count=st.integers(1, 4), how=st.sampled_from(["borda", "rrf", "round_robin"]), named=st.booleans())
def test_the_order_is_that_of_the_sums(seed, count, how, named):
    made = some(seed, count, IDS if named else None)
    expected = naive(made, how, IDS if named else None)
    one = ensemble(made, how, len(expected))
    assert one.indices.tolist() == expected
    assert (one.ids is None) != named and (not named or list(one.ids) == [IDS[i] for i in expected])
    for k in (1, len(expected) // 2 or 1):
        assert ensemble(made, how, k).indices.tolist() == expected[:k]
    for name, other in made.items():
        ranks = [other.indices.tolist().index(row) if row in other.indices else -1 for row in expected]
        assert one.evidence[f"rank_{name}"].tolist() == ranks


@settings(max_examples=60)
@given(seed=SEEDS, tokens=st.integers(40, 2000), how=st.sampled_from(["borda", "rrf", "round_robin"]))
def test_budgets_are_exact(seed, tokens, how):
    made = some(seed, 3)
    cost = np.random.default_rng(seed).integers(1, 40, N)
    ranked = naive(made, how, IDS)
    chosen = ensemble(made, how, {"tokens": tokens}, cost=cost).indices.tolist()
    assert chosen == ranked[: len(chosen)] and cost[chosen].sum() <= tokens
    assert len(chosen) == len(ranked) or cost[ranked[: len(chosen) + 1]].sum() > tokens
    assert len(ensemble(made, how)) == max(map(len, made.values()))


def test_a_selection_with_itself_and_turns():
    one = of([4, 9, 2, 7])
    for how in ("borda", "rrf", "round_robin"):
        assert ensemble({"a": one, "b": one}, how).indices.tolist() == [4, 9, 2, 7]
    both = ensemble({"a": one, "b": of([9, 1, 4, 3])}, "round_robin", 6)
    assert both.indices.tolist() == [4, 9, 2, 1, 7, 3]
    assert both.evidence["turn"].tolist() == ["a", "b", "a", "b", "a", "b"]
    fused = ensemble({"a": of([0, 1, 2]), "b": of([1, 0, 5]), "c": of([8])}, "rrf", 3)
    assert fused.scores[[0, 1, 8]] == pytest.approx([1 / 61 + 1 / 62, 1 / 61 + 1 / 62, 1 / 61]) and np.isnan(fused.scores[20])


def test_mistakes_are_named():
    made = some(0, 2)
    with pytest.raises(UsageError, match="how: 'bords'"):
        ensemble(made, "bords")
    with pytest.raises(UsageError, match="different pools"):
        ensemble({**made, "other": Selection(np.array([0]), N + 1)})
    with pytest.raises(UsageError, match="other pools"):
        ensemble({"a": of([1]), "b": of([1], IDS[::-1])})
    with pytest.raises(UsageError, match="9 rows is more than the 2 rows"):
        ensemble({"a": of([1, 2])}, budget=9)
    with pytest.raises(UsageError, match="cost"):
        ensemble(made, budget={"tokens": 5})
    with pytest.raises(UsageError, match="at least one"):
        ensemble({})


def test_the_command_on_a_run(tmp_path, tiny_model):
    methods = {"random": {"selector": "random"}, "length": {"selector": "length"}, "balanced": {"selector": "balanced"}}
    run = Run(recipe_of(tmp_path, tiny_model, tiny.chats(40), methods=methods, seeds=[0, 1], budget={"tokens": 200}))
    for stage in (prepare, extract_stage, select_stage):
        stage(run)
    for option, value, told in (("methods", ",", "names none"), ("budget", "tokens:many", "type for example --budget tokens:")):
        with pytest.raises(UsageError, match=told):
            command([run.folder], "x", **{option: value})
    words = ["ensemble", str(run.folder), "--methods", "random,length", "--how", "rrf", "--out", "fused", "--json"]
    done = subprocess.run([sys.executable, "-m", "llmselect", *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert [one["folder"][-12:] for one in json.loads(done.stdout)] == ["fused/seed-0", "fused/seed-1"]
    place = run.folder / "selections"
    made, cost = Selection.load(place / "fused" / "seed-1"), run.store["tokens.supervised"][:]
    of_seed = {name: Selection.load(place / name / "seed-1") for name in ("random", "length")}
    assert made.indices.tolist() == ensemble(of_seed, "rrf", {"tokens": 200}, cost=cost).indices.tolist()
    assert cost[made.indices].sum() <= 200
    again = ensemble_runs([run.folder], None, "round_robin", "all", 6)  # of the methods, not of the ensemble
    assert [name for name in Selection.load(again[0]).evidence if name != "turn"] == [f"rank_{m}" for m in sorted(methods)]
    with pytest.raises(UsageError, match=r"no 'lenght'\. Did you mean 'length'"):
        ensemble_runs([run.folder], ["lenght"], "borda", "x")
    with pytest.raises(UsageError, match="method 'length' of its own"):
        ensemble_runs([run.folder], ["random"], "borda", "length")
    with pytest.raises(UsageError, match="no selections there"):
        ensemble_runs([tmp_path / "nothing"], None, "borda", "x")
    for name in ("../../fused", "full", ""):
        with pytest.raises(UsageError, match="not a name"):
            ensemble_runs([run.folder], ["random"], "borda", name)
    (tmp_path / "other").mkdir()
    twin = tmp_path / "other" / run.folder.name  # another run whose folder has the same name
    shutil.copytree(run.folder, twin)
    both = Selection.load(ensemble_runs([run.folder, twin], ["random"], "borda", "twins")[0])
    assert sorted(both.evidence) == sorted(f"rank_{one}/random" for one in (run.folder, twin))
