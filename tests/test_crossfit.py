"""Cross-fitting: rows of the target in the pool are scored by adapters that have not seen them."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from datasets import Dataset
from test_color import TRAIN, trained
from test_stages import recipe_of, turn, write
from test_trajectory import naive

import tiny
from llmselect import config
from llmselect.color import adapters_of_task, plan_folds
from llmselect.errors import LlmselectError, UsageError
from llmselect.folds import Folds, Sharing, deal, folds_of, shared_rows
from llmselect.prepare import prepare
from llmselect.recipe import load_recipe
from llmselect.stages import Run, extract_stage

TARGET, FRESH = tiny.chats(8, 50), [chat for chat in tiny.chats(40, 90) if len(chat) == 2][8:20]
NEAR = [[*chat[:-1], {"role": "assistant", "content": "It is seven, of course."}] for chat in TARGET[:2]]


def rows(chats, group="t"):
    return Dataset.from_list([{"id": f"{group}{i}", "messages": chat, "group": group} for i, chat in enumerate(chats)])


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_model):
    """A run whose pool holds the target, and other answers to two of its prompts."""
    folder = tmp_path_factory.mktemp("leak")
    recipe_of(folder, tiny_model, tiny.chats(12) + TARGET + NEAR + FRESH, color={"train": {**TRAIN, "epochs": 8}},
              pool={"path": "./pool.jsonl", "decontaminate": False}, features={"color": {"extractor": "color"}},
              targets={"t": {"dev": write(folder / "t.jsonl", TARGET)}})  # fmt: skip
    made = Run(load_recipe(folder / "recipe.yaml", ["model.max_length=128"]))
    prepare(made)
    extract_stage(made)
    return made


def losses(run, model, *places):
    chats = run.pool["messages"][:] + run.target["messages"][:]
    found = np.stack([naive(str(model), run.folder / "color" / "t" / place, chats)[0] for place in places], 1)
    return {"": found[: len(run.pool)], "@target": found[len(run.pool) :]}


def test_a_row_of_the_target_is_scored_by_the_adapter_that_has_not_seen_it(run, tiny_model):
    folder = run.folder / "color" / "t" / "conditional"
    folds = Folds.load(folder)
    leaked = [m in TARGET + NEAR for m in run.pool["messages"][:]]
    assert folds.count == 2 and 8 <= sum(leaked) <= 10
    assert set(folds.of) == {*run.target["id"], *np.array(run.pool["id"])[leaked]}
    for k, place in enumerate(folds.places(folder)):
        seen = [row_id for row_id in run.target["id"] if folds.of[row_id] != k]
        assert len(seen) == 4 and trained(place)["key"]["rows"] == config.fingerprint(seen)
    tokens = {trained(one)["result"]["tokens"] for one in (*folds.places(folder), folder.with_name("prior"))}
    assert tokens == {8 * int(run.store["tokens@target.supervised"][:].sum())}
    expected = losses(run, tiny_model, "conditional/fold-0", "conditional/fold-1", "prior")
    for side, data in (("", run.pool), ("@target", run.target)):
        own = [one[folds.of[i]] if i in folds.of else one[:2].mean() for i, one in zip(data["id"], expected[side], strict=True)]
        np.testing.assert_allclose(run.store[f"color{side}.conditional"][:, 0], own, rtol=1e-4)
        np.testing.assert_allclose(run.store[f"color{side}"][:, 0], expected[side][:, 2] - own, atol=5e-3)
    asked = {row["messages"][0]["content"]: folds.of[row["id"]] for row in run.target}
    for row in run.pool:
        if row["messages"] in NEAR:
            assert folds.of[row["id"]] == asked[row["messages"][0]["content"]]


def test_it_takes_most_of_the_bias_away(run, tmp_path, tiny_model, caplog):
    settings, target = replace(run.recipe.color, folds=1), run.target
    with caplog.at_level(logging.WARNING, "llmselect"):
        plan_folds(run.pool, target, tmp_path / "conditional", settings, "t")
    assert "rows of the pool share text with target 't' and score too high" in caplog.text and "color.folds: 2" in caplog.text
    cost, target_cost = (run.store[f"tokens{side}.supervised"][:] for side in ("", "@target"))
    shutil.copytree(run.folder / "color" / "t" / "prior", tmp_path / "prior")  # the same whatever the folds: it stays
    adapters_of_task(run.pool, target, cost, target_cost, tmp_path, settings, model=str(tiny_model), dtype="auto", max_length=128)
    chats = run.pool["messages"][:]
    inside, like = (np.array([m in some for m in chats]) for some in (TARGET, FRESH))
    alone = run.store["color.prior"][:, 0] - naive(str(tiny_model), tmp_path / "conditional", chats)[0]
    crossed = run.store["color"][:, 0]
    bias = [values[inside].mean() - values[like].mean() for values in (alone, crossed)]
    assert bias[0] > 0.5 and abs(bias[1]) < 0.5 * bias[0], bias


def test_other_folds_in_the_same_folder_are_refused(run):
    out = run.folder / "color" / "t" / "conditional"
    plan_folds(run.pool, run.target, out, run.recipe.color, "t")
    with pytest.raises(LlmselectError, match=r"color\.folds: 2, now it is 3; delete"):
        plan_folds(run.pool, run.target, out, replace(run.recipe.color, folds=3), "t")


def test_folds_are_deterministic_whatever_the_order_of_rows():
    chats = [turn(f"question {i}", f"answer {i}") for i in range(20)]
    # Rows 3 and 11 share 15 words, 5 and 6 a prompt.
    same = " ".join(f"word{i}" for i in range(15))
    chats[3], chats[11] = turn("three", f"{same} a"), turn("eleven", f"b {same}")
    chats[6] = turn("Question, 5!", "other")
    target = rows(chats)
    parts = Sharing(target).parts(target)
    assert len(np.unique(parts)) == 18 and parts[3] == parts[11] and parts[5] == parts[6]
    fold = deal(parts, target["id"][:], 3, 0)
    assert sorted(np.bincount(fold)) == [6, 7, 7] and fold[3] == fold[11] and fold[5] == fold[6]
    order = np.random.default_rng(0).permutation(20)
    moved = target.select(order)
    np.testing.assert_array_equal(deal(Sharing(moved).parts(moved), moved["id"][:], 3, 0), fold[order])
    assert deal(parts, target["id"][:], 3, 1).tolist() != fold.tolist()
    with pytest.raises(UsageError, match="20 rows, of which only 18 parts share no text; give at most 18"):
        deal(parts, target["id"][:], 19, 0)


def test_pool_rows_go_where_most_of_their_text_is():
    one, other = (" ".join(f"{name}{i}" for i in range(30)) for name in ("left", "right"))
    target = rows([turn("first", one), turn("second", other), turn("third", "nothing"), turn("fourth", "template")])
    pool = rows([turn("a", f"{one} and {' '.join(other.split()[:14])}"), turn("b", "clean"), turn("SECOND!", "x"),
                 turn("c", " ".join(one.split()[:12]))], "p")  # fmt: skip
    sharing = Sharing(target)
    shared = shared_rows(pool, sharing)
    assert {name: (found.count(0), found.count(1)) for name, found in shared.items()} == {"p0": (18, 2), "p2": (0, 1)}
    folds, several = folds_of(sharing.ids, np.array([0, 1, 0, 1]), shared)
    assert (folds.count, several) == (2, 1) and (folds.of["p0"], folds.of["p2"], folds.of["t3"]) == (0, 1, 1)
    assert shared_rows(target, sharing) == {f"t{i}": [i] for i in range(4)}


def test_folds_are_read_back_and_missing_adapters_are_told(tmp_path, tiny_model):
    from llmselect.extractors.color import Color

    Folds(2, {"a": 1, "b": 0}).save(tmp_path)
    assert Folds.load(tmp_path) == Folds(2, {"a": 1, "b": 0}) and Folds.load(tmp_path / "no") is None
    with pytest.raises(LlmselectError, match=r"2 folds, .*fold-0 holds no adapter"):
        Color(model=str(tiny_model), prior=None, conditional=str(tmp_path)).settings()
    (tmp_path / "folds.json").write_text((tmp_path / "folds.json").read_text().replace('"a": 1', '"a": 0'))
    with pytest.raises(LlmselectError, match=r"folds\.json"):
        Folds.load(tmp_path)


def test_a_target_of_one_part_cannot_be_cut(tmp_path, caplog):
    chats = [turn("one question", f"answer {i}") for i in range(3)]
    settings = SimpleNamespace(folds=None, seed=0)
    with caplog.at_level(logging.WARNING, "llmselect"):
        plan_folds(rows(chats[:1]), rows(chats), tmp_path / "c", settings, "t")
    assert "1 rows of the pool share text" in caplog.text and "folds: 2" not in caplog.text and not (tmp_path / "c").exists()
    with pytest.raises(UsageError, match=r"color\.folds: target 't': 2 folds of 3 rows, of which only 1 parts"):
        plan_folds(rows(chats[:1]), rows(chats), tmp_path / "c", SimpleNamespace(folds=2, seed=0), "t")
