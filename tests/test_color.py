"""CoLoR-Filter: for each task two adapters of equal training, and the difference of their losses."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file
from test_stages import recipe_of, turn, write
from test_trajectory import computed, naive

import tiny
from llmselect import atomic
from llmselect.color import ColorTraining, adapters_of_task
from llmselect.engine.backbone import Backbone
from llmselect.engine.passes import Pass
from llmselect.errors import UsageError
from llmselect.estimate import estimate
from llmselect.extractors.color import Color
from llmselect.prepare import prepare
from llmselect.recipe import load_recipe
from llmselect.selection import Selection
from llmselect.selectors.ccs import Ccs
from llmselect.stages import Run, extract_stage, select_stage
from llmselect.train import Train

TRAIN = {"epochs": 12, "batch_tokens": 60, "lora": {"r": 4, "target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"]},
         "sft": {"learning_rate": 1e-2}}  # fmt: skip
ADAPTERS = ("prior", "conditional")
METHODS = {"color": {"selector": "topk", "x": "color"}, "sums": {"selector": "topk", "x": "color", "tasks": ["u"]},
           "strata": {"selector": "ccs", "x": "color", "tasks": ["u"]},
           "easy": {"selector": "topk", "x": "color.prior", "order": "asc", "tasks": ["t"]}}  # fmt: skip


def french(i):
    return turn(f"say {i}", f"Bonjour. Bonjour. {i} Bonjour.")


def sums(i):
    return turn(f"add {i}", f"def add(a, b): return a + b + {i}")


def targets(folder, names):
    """Four rows of French, six of sums: tasks of different sizes."""
    rows = {"t": [french(i) for i in range(100, 104)], "u": [sums(i) for i in range(200, 206)]}
    return {name: {"dev": write(folder / f"{name}.jsonl", rows[name])} for name in names}


def run_of(folder, model, names):
    features = {"color": {"extractor": "color"}}
    methods = {name: one for name, one in METHODS.items() if set(one.get("tasks", [])) <= set(names)}
    chats = tiny.chats(100) + [french(i) for i in range(6)] + [sums(i) for i in range(6)]
    recipe = recipe_of(folder, model, chats, features=features, methods=methods, color={"train": TRAIN}, budget=6,
                       targets=targets(folder, names))  # fmt: skip
    made = Run(recipe)
    for stage in (prepare, extract_stage, select_stage):
        stage(made)
    return made


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_model):
    return run_of(tmp_path_factory.mktemp("color"), tiny_model, ["t", "u"])


def place(run, task, name):
    return run.folder / "color" / task / name


def trained(folder):
    return json.loads((folder / "train.json").read_text())


def test_scores_are_differences_of_losses(run, tiny_model):
    chats = tiny.chats(7, 30)
    given = {name: {task: str(place(run, task, name)) for task in "tu"} for name in ADAPTERS}
    passing = Pass(Backbone(str(tiny_model), max_length=128), {"f": Color(model=str(tiny_model), **given)}, {}, {}, [*"tu"], 700)
    got = passing.compute(chats, [str(i) for i in range(7)], ["f"])["f"]
    for g, task in enumerate("tu"):
        prior, conditional = (naive(str(tiny_model), place(run, task, name), chats)[0] for name in ADAPTERS)
        np.testing.assert_allclose(got["prior"][:, g], prior, rtol=1e-4)
        np.testing.assert_allclose(got["conditional"][:, g], conditional, rtol=1e-4)
        np.testing.assert_allclose(got["value"][:, g], prior - conditional, atol=2e-3)
    one = computed(Color(model=str(tiny_model), prior=None, conditional=given["conditional"]["u"]), chats)
    assert one["value"].shape == (7,), "the same folders for all tasks: one column, as a number per row"
    np.testing.assert_allclose(one["prior"], naive(str(tiny_model), None, chats)[0], rtol=1e-4)
    np.testing.assert_array_equal(one["conditional"], got["conditional"][:, 1])


def test_adapters_of_a_task_are_trained_on_as_many_tokens(run):
    tokens, group = run.store["tokens@target.supervised"][:], np.array(run.target["group"])
    for task, rows in (("t", 4), ("u", 6)):
        prior, conditional = (trained(place(run, task, name)) for name in ADAPTERS)
        assert {one["result"]["tokens"] for one in (prior, conditional)} == {12 * tokens[group == task].sum()}
        assert prior["key"]["rows"] != conditional["key"]["rows"] and conditional["provenance"]["rows"] == rows
        assert not (place(run, task, "conditional") / "folds.json").exists(), "the pool holds no text of the target"


def test_rows_like_a_target_are_taken_for_it(run):
    text = np.array([chat[-1]["content"] for chat in run.pool["messages"]])
    scores = run.store["color"][:]
    assert scores.shape == (len(run.pool), 2) and run.store["color@target"].shape == (10, 2)
    for g, start in enumerate(("Bonjour. Bonjour.", "def add(a, b): return a + b +")):
        like = np.char.startswith(text, start)
        above = scores[like, g][:, None] > scores[~like, g]
        assert like.sum() == 6 and above.mean() > 0.9
    made = {name: Selection.load(run.folder / "selections" / name / "seed-0").indices for name in METHODS}
    assert set(made["sums"]) == set(np.argsort(-scores[:, 1])[:6])
    of_one = Ccs().select(6, seed=0, ids=run.pool["id"], x=scores[:, 1])
    assert made["strata"].tolist() == of_one.indices.tolist(), "a column of one task is a score like any other"
    assert set(made["easy"]) == set(np.argsort(run.store["color.prior"][:, 0])[:6])
    first = set(np.argsort(-scores[:, 0])[:3])
    assert first <= set(made["color"]) and made["color"][0] == scores[:, 0].argmax(), "tasks take turns"


def test_a_column_is_that_of_a_run_with_this_task_only(run, tmp_path, tiny_model):
    alone = run_of(tmp_path, tiny_model, ["u"])
    assert alone.store["color"].shape == (len(run.pool), 1)
    np.testing.assert_allclose(alone.store["color"][:, 0], run.store["color"][:, 1], rtol=1e-5, atol=1e-5)
    picked = [Selection.load(one.folder / "selections" / "sums" / "seed-0").indices.tolist() for one in (alone, run)]
    assert picked[0] == picked[1]


def test_what_is_trained_stays_and_what_is_missing_is_made_anew(run):
    files = sorted((run.folder / "color").rglob("adapter_model.safetensors"))
    before = {file: (file.stat().st_mtime_ns, atomic.sha256_file(file)) for file in files}
    lost = place(run, "u", "prior")
    lost.rename(lost.with_name("gone"))
    extract_stage(run)
    after = {file: (file.stat().st_mtime_ns, atomic.sha256_file(file)) for file in files}
    assert len(files) == 4 and [one for one in files if before[one] != after[one]] == [lost / "adapter_model.safetensors"]
    assert all(before[one][1] == after[one][1] for one in files)


def test_a_target_too_small_for_more_than_a_step_is_told(run, tmp_path, tiny_model, caplog):
    target, cost = (run.target.select(range(2)), run.store["tokens.supervised"][:])
    adapters_of_task(run.pool, target, cost, run.store["tokens@target.supervised"][:2], tmp_path, ColorTraining(),
                     model=str(tiny_model), dtype="float32", max_length=96)  # fmt: skip
    for name in ADAPTERS:
        assert trained(tmp_path / name)["result"]["steps"] == 1
        assert f"color: {tmp_path / name} is trained for 1 steps" in caplog.text
        weights = load_file(tmp_path / name / "adapter_model.safetensors")
        assert any(value.any() for key, value in weights.items() if "lora_B" in key)


def test_what_it_costs_is_told_without_the_training(run):
    assert estimate(run.recipe)["feature_bytes"] > 12 * 2 * 100


@pytest.mark.parametrize(
    "more,told",
    [
        ({"features": {"c": {"extractor": "color"}}}, r"features\.c: adapters 'trained' need a color: section"),
        ({"features": {"c": {"extractor": "color", "prior": None, "conditional": {"t": "x"}}}},
         r"features\.c\.conditional: folders for \['t'\]; give one for each of the targets \['t', 'u'\]"),
        ({"features": {"c": {"extractor": "color", "prior": None, "conditional": "x"}},
          "methods": {"m": {"selector": "topk", "x": "c", "tasks": ["t"]}}}, "selects the same rows whatever the task"),
        ({"color": {"train": {"tokens": 50}}}, r"color\.train\.tokens"),
        ({"color": {"train": {"sft": {"learning_rat": 1}}}}, "learning_rat"),
        ({"color": {"tokens": 0}}, r"color\.tokens: 0"),
        ({"color": {"folds": 0}}, r"color\.folds: 0"),
    ],
)  # fmt: skip
def test_mistakes_are_named(tmp_path, tiny_model, more, told):
    with pytest.raises(UsageError, match=told):
        recipe_of(tmp_path, tiny_model, tiny.chats(3), **more)


def test_folders_by_task_come_in_the_order_of_the_targets(tmp_path, tiny_model):
    feature = {"extractor": "color", "prior": "./p", "conditional": {"u": "./a", "t": "./b"}}
    recipe_of(tmp_path, tiny_model, tiny.chats(3), features={"c": feature})
    made = load_recipe(tmp_path / "recipe.yaml").extractor("c")
    assert list(made.conditional.items()) == [("t", str(tmp_path / "b")), ("u", str(tmp_path / "a"))] and made.by_group
    with pytest.raises(UsageError, match=r"adapters for \['t', 'u'\], the target groups are \['u', 't'\]"):
        made.arrays(None, ["u", "t"])


def test_trained_needs_a_recipe(tiny_model):
    with pytest.raises(UsageError, match="color: section"):
        Color(model=str(tiny_model)).settings()
    assert ColorTraining(train=Train(epochs=2)).train.epochs == 2
