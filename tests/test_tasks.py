"""Methods that select for some tasks of a run: as if the run had these tasks only."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

import tiny
from llmselect.errors import UsageError
from llmselect.prepare import prepare
from llmselect.recipe import load_recipe
from llmselect.report.why import Explainer
from llmselect.selection import Selection
from llmselect.stages import Run, extract_stage, select_stage
from llmselect.tasks import aimed, tasks_of

METHODS = {
    "trim": {"selector": "topk", "x": "trim"},
    "mean": {"selector": "topk", "x": "trim", "reduce": "mean"},
    "turns": {"selector": "topk", "x": ["trim", "loss.nll"]},
    "rds": {"selector": "similarity", "x": "rds"},
    "groups": {"selector": "similarity", "x": "rds", "combine": "mean"},
    "dsir": {"selector": "dsir", "x": "ngram"},
    "bm25": {"selector": "bm25", "x": "ngram"},
    "matched": {"selector": "random_matched"},
    "quad": {"selector": "quad", "x": "rds", "quality": "influence"},
}


def write(path, chats):
    path.write_text("".join(json.dumps({"messages": c, "source": f"s{i % 3}"}) + "\n" for i, c in enumerate(chats)))
    return str(path)


def run_of(folder, model, names, tasks=None, more=()):
    dev = {"z": tiny.chats(4, 50), "m": tiny.chats(3, 60), "a": tiny.chats(5, 70)}
    part = {} if tasks is None else {"tasks": tasks}
    plan = {
        "name": "tasks", "out": str(folder), "model": {"path": str(model), "max_length": 96},
        "pool": {"path": write(folder.with_suffix(".jsonl"), tiny.chats(60))},
        "targets": {name: {"dev": write(folder.with_name(f"{folder.name}-{name}.jsonl"), dev[name])} for name in names},
        "features": {"trim": {"extractor": "trim"}, "rds": {"extractor": "embedding"}, "ngram": {"extractor": "ngram"},
                     "loss": {"extractor": "loss", "without_prompt": False},
                     "influence": {"extractor": "influence", "lazy": True, "curvature": "none"}},
        "methods": {**{name: {**one, **part} for name, one in METHODS.items()}, **dict(more)},
        "budget": "20%",
    }  # fmt: skip
    file = folder.with_suffix(".json")
    file.write_text(json.dumps(plan))
    return Run(load_recipe(file))


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_model):
    """A run with three tasks whose methods select for two of them, and a run with these two only."""
    folder = tmp_path_factory.mktemp("tasks")
    made = run_of(folder / "part", tiny_model, ["z", "m", "a"], ["z", "a"]), run_of(folder / "alone", tiny_model, ["z", "a"])
    for run in made:
        prepare(run)
        extract_stage(run)
        select_stage(run)
    return made


def selection(run, method):
    return Selection.load(run.folder / "selections" / method / "seed-0")


@pytest.mark.parametrize("method", METHODS)
def test_it_is_the_selection_of_a_run_with_these_tasks_only(runs, method):
    part, alone = (selection(run, method) for run in runs)
    assert part.indices.tolist() == alone.indices.tolist()
    if part.scores is not None:
        np.testing.assert_allclose(part.scores, alone.scores, rtol=1e-5, atol=1e-6)


def test_another_task_selects_other_rows(runs, tmp_path, tiny_model):
    part, _ = runs
    other = run_of(part.folder, tiny_model, ["z", "m", "a"], more={"m-rds": {**METHODS["rds"], "tasks": ["m"]}}.items())
    select_stage(Run(replace(other.recipe, methods={"m-rds": other.recipe.methods["m-rds"]})))
    assert selection(part, "m-rds").indices.tolist() != selection(part, "rds").indices.tolist()


def test_rows_and_groups_of_the_evidence_are_those_of_the_run(runs):
    part, alone = runs
    assert tasks_of(part, "rds").rows.tolist() == [0, 1, 2, 3, 7, 8, 9, 10, 11] and tasks_of(alone, "rds") is None
    assert (tasks_of(part, "rds").columns.tolist(), tasks_of(part, "rds").ordered.tolist()) == ([0, 2], [0, 2])
    for method, key in (("rds", "nearest"), ("bm25", "query"), ("trim", "group"), ("groups", "group")):
        mine, theirs = (selection(run, method).evidence.get(key) for run in runs)
        if key == "group":
            names = [Explainer(run)._groups(view, {"group": found}, len(found)) for run, found, view in (
                (part, mine, _view(part, method)), (alone, theirs, _view(alone, method)))]  # fmt: skip
        else:
            names = [[run.target["id"][int(row)] for row in found] for run, found in ((part, mine), (alone, theirs))]
        assert names[0] == names[1] and len(set(names[0])) > 1, method


def test_columns_of_several_features_are_counted_as_they_stand(runs):
    part, alone = (selection(run, "turns").evidence["group"].tolist() for run in runs)
    assert part == alone and part[:3] == [0, 1, 2]  # TRIM for two tasks, and the loss


def _view(run, method):
    return SimpleNamespace(selection=selection(run, method))


@pytest.mark.parametrize(
    "tasks,method,told",
    [
        (["q"], METHODS["rds"], r"methods\.x\.tasks: no target 'q'"),
        ([], METHODS["rds"], r"methods\.x\.tasks: give a list"),
        ("z", METHODS["rds"], r"methods\.x\.tasks: give a list"),
        (["z"], {"selector": "random"}, r"methods\.x\.tasks: 'random' selects the same rows"),
        (["z"], {"selector": "kcenter", "x": "rds"}, r"'kcenter' selects the same rows"),
    ],
)
def test_mistakes_are_named(tmp_path, tiny_model, tasks, method, told):
    with pytest.raises(UsageError, match=told):
        run_of(tmp_path / "r", tiny_model, ["z", "a"], more={"x": {**method, "tasks": tasks}}.items())


def test_what_looks_at_targets_is_told_apart(runs):
    recipe = runs[0].recipe
    more = {"k": {"selector": "kcenter", "x": "rds"}, "r": {"selector": "random"}}
    recipe = replace(recipe, methods={**recipe.methods, **more})
    assert {name for name in recipe.methods if aimed(recipe, name)} == set(METHODS)
