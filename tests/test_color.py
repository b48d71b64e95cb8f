"""CoLoR-Filter: two adapters of equal training, and the difference of their losses."""

from __future__ import annotations

import json

import numpy as np
import pytest
from test_stages import recipe_of
from test_trajectory import computed, naive

import tiny
from llmselect.color import ColorTraining
from llmselect.errors import UsageError
from llmselect.estimate import estimate
from llmselect.extractors.color import Color
from llmselect.prepare import prepare
from llmselect.recipe import load_recipe
from llmselect.selection import Selection
from llmselect.stages import Run, extract_stage, select_stage
from llmselect.train import Train

TRAIN = {"epochs": 12, "batch_tokens": 60, "lora": {"r": 4, "target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"]},
         "sft": {"learning_rate": 1e-2}}  # fmt: skip


def turn(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_model):
    like_target = [turn(f"say {i}", f"Bonjour. Bonjour. {i} Bonjour.") for i in range(6)]
    folder = tmp_path_factory.mktemp("color")
    more = {"features": {"color": {"extractor": "color"}, "cold": {"extractor": "color", "prior": None}},
            "methods": {"color": {"selector": "topk", "x": "color"}}, "color": {"train": TRAIN}, "budget": 6}  # fmt: skip
    recipe_of(folder, tiny_model, tiny.chats(150) + like_target, **more)
    for name, start in (("dev", 100), ("dev2", 200)):
        rows = [turn(f"tell {i}", f"Bonjour. {i} Bonjour. Bonjour.") for i in range(start, start + 4)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"messages": one}) + "\n" for one in rows))
    made = Run(load_recipe(folder / "recipe.yaml"))
    for stage in (prepare, extract_stage, select_stage, extract_stage):
        stage(made)
    return made


def test_scores_are_differences_of_losses(run, tiny_model):
    chats = tiny.chats(7, 30)
    places = [run.folder / "color" / name for name in ("prior", "conditional")]
    got = computed(Color(model=str(tiny_model), prior=str(places[0]), conditional=str(places[1])), chats)
    prior, conditional = (naive(str(tiny_model), place, chats)[0] for place in places)
    np.testing.assert_allclose(got["prior"], prior, rtol=1e-4)
    np.testing.assert_allclose(got["conditional"], conditional, rtol=1e-4)
    np.testing.assert_allclose(got["value"], prior - conditional, atol=2e-3)
    base = computed(Color(model=str(tiny_model), prior=None, conditional=str(places[1])), chats)
    np.testing.assert_allclose(base["prior"], naive(str(tiny_model), None, chats)[0], rtol=1e-4)
    np.testing.assert_array_equal(base["conditional"], got["conditional"])


def test_both_adapters_are_trained_on_as_many_tokens(run):
    told = {name: json.loads((run.folder / "color" / name / "train.json").read_text()) for name in ("prior", "conditional")}
    own = int(run.store["tokens@target.supervised"][:].sum())
    assert {one["result"]["tokens"] for one in told.values()} == {12 * own}
    assert told["prior"]["key"]["rows"] != told["conditional"]["key"]["rows"]
    assert told["conditional"]["provenance"]["rows"] == len(run.target) == 8


def test_rows_like_the_target_are_taken(run):
    made = Selection.load(run.folder / "selections" / "color" / "seed-0")
    like = np.array(["Bonjour. Bonjour." in chat[-1]["content"] for chat in run.pool["messages"]])
    scores = run.store["color"][:]
    above = scores[like][:, None] > scores[~like]
    assert like.sum() == 6 and above.mean() > 0.9 and like[made.indices].sum() >= 3
    np.testing.assert_array_equal(np.sort(scores[made.indices])[::-1], np.sort(scores)[::-1][:6])


def test_what_it_costs_is_told_without_the_training(run):
    assert estimate(run.recipe)["feature_bytes"] > 12 * 2 * 130


@pytest.mark.parametrize(
    "more,told",
    [
        ({"features": {"c": {"extractor": "color"}}}, r"features\.c: adapters 'trained' need a color: section"),
        ({"color": {"train": {"tokens": 50}}}, r"color\.train\.tokens"),
        ({"color": {"train": {"sft": {"learning_rat": 1}}}}, "learning_rat"),
        ({"color": {"tokens": 0}}, r"color\.tokens: 0"),
    ],
)
def test_mistakes_are_named(tmp_path, tiny_model, more, told):
    with pytest.raises(UsageError, match=told):
        recipe_of(tmp_path, tiny_model, tiny.chats(3), **more)


def test_trained_needs_a_recipe(tiny_model):
    with pytest.raises(UsageError, match="color: section"):
        Color(model=str(tiny_model)).settings()
    assert ColorTraining(train=Train(epochs=2)).train.epochs == 2
