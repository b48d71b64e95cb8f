"""CoLoR-Filter in a grid: adapters are trained where a method reads them, kept in a cell's key, and counted as its cost."""

from __future__ import annotations

import json

import pytest
from test_benchmark import grid

import tiny
from llmselect.benchmark.cells import extract_features, run_grid
from llmselect.benchmark.grid import load_grid, parse_only
from llmselect.benchmark.outlook import outlook
from llmselect.benchmark.results import load
from llmselect.errors import LlmselectError
from llmselect.selection import Selection

COLOR = {"train": {"epochs": 1, "batch_tokens": 100, "lora": {"r": 4}, "sft": {"learning_rate": 1e-2}}}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_model):
    """Two tasks, each alone, and the cells of `color`."""
    folder = tmp_path_factory.mktemp("grid")
    lines = lambda chats: "".join(json.dumps({"messages": c}) + "\n" for c in chats)  # noqa: E731
    (folder / "dev-u.jsonl").write_text(lines(tiny.chats(6, 55)))
    (folder / "test-u.jsonl").write_text(lines(tiny.chats(4, 75)))
    file = grid(folder, tiny_model, color=COLOR, seeds=[0],
                tasks={t: {"dev": f"./dev{end}.jsonl", "test": f"./test{end}.jsonl"} for t, end in (("t", ""), ("u", "-u"))},
                features={"color": {"extractor": "color"}, "ngram": {"extractor": "ngram", "buckets": 64}},
                methods={"color": {"selector": "topk", "x": "color"}, "dsir": {"selector": "dsir", "x": "ngram"}})  # fmt: skip
    plan = load_grid(file)
    return plan, run_grid(plan, parse_only(["method=color"], plan))


def test_every_target_is_selected_for_alone(finished):
    plan, tally = finished
    assert not tally.failed and [(c.method, c.target) for c in tally.ran] == [("color", "t"), ("color", "u")]
    run = extract_features(plan, "tiny", ["color"])
    for g, task in enumerate("tu"):
        made = Selection.load(plan.folder / "tiny" / "selections" / f"color-20pct-{task}" / "seed-0")
        assert made.indices.tolist() == run.store["color"][:, g].argsort()[::-1][: len(made)].tolist()


def test_what_color_costs(finished):
    plan, tally = finished
    run = extract_features(plan, "tiny", ["color", "ngram"])
    known = json.loads((plan.folder / "tiny" / "costs.json").read_text())
    told = [json.loads(file.read_text())["result"]["tokens"] for file in (run.folder / "color").rglob("train.json")]
    training = 3 * sum(told) / run.store["tokens.supervised"][:].sum()
    assert len(told) == 4 and known["forwards"] == {"color:": pytest.approx(training, abs=1e-4), "color": 4, "ngram": 0}
    assert set(known["seconds"]) == {"color:", "color", "ngram"} and known["seconds"]["color:"] > 0
    for cell in tally.ran:
        found = load(plan.results / cell.path)
        mine = ("color:", "color")  # for one of two tasks
        assert found.forwards == pytest.approx(0.5 * sum(known["forwards"][name] for name in mine), abs=1e-3)
        assert found.seconds["features"] == pytest.approx(0.5 * sum(known["seconds"][name] for name in mine), abs=1e-3)


def test_the_section_is_part_of_what_it_changes_only(finished):
    plan, tally = finished
    keys = {cell.method: plan.key(cell) for cell in plan.cells()}
    assert keys["color"]["target"] == ["u"] and load(plan.results / tally.ran[1].path).key == keys["color"]
    assert keys["color"]["color"]["train"]["epochs"] == 1 and keys["color"]["features"] == {"color": {"extractor": "color"}}
    assert not {"color", "warmup", "sae"} & set(keys["dsir"])
    changed = load_grid(plan.home / "out.yaml", ["color.train.epochs=2"])
    with pytest.raises(LlmselectError, match=r"color\.train\.epochs: 1 -> 2"):
        run_grid(changed, parse_only(["method=color"], changed))
    assert [changed.key(c) == plan.key(c) for c in plan.cells()] == [c.method != "color" for c in plan.cells()]
    told = outlook(plan, parse_only(["method=color,dsir"], plan))
    assert (told["done"], told["missing"]) == (2, 2)


def test_adapters_are_trained_only_where_they_are_read(finished, tmp_path, tiny_model):
    plan = load_grid(grid(tmp_path, tiny_model, color=COLOR, features={"ngram": {"extractor": "ngram", "buckets": 64}},
                          methods={"dsir": {"selector": "dsir", "x": "ngram"}}))  # fmt: skip
    run = extract_features(plan, "tiny", ["ngram"])
    assert not (run.folder / "color").exists() and run.recipe.color is None
