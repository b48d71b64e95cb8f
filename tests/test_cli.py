"""The command line as a user meets it: mistakes cost one clear line and exit code 2, before any model loads."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import chdir
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import tiny
from llmselect.cli import app
from llmselect.errors import UsageError
from llmselect.recipe import load_recipe
from llmselect.store import FeatureStore


def lines(path: Path, chats) -> str:
    path.write_text("".join(json.dumps({"messages": c, "source": f"s{i % 3}"}) + "\n" for i, c in enumerate(chats)))
    return str(path)


@pytest.fixture
def recipe(tmp_path, tiny_model):
    plan = {
        "name": "cli",
        "out": str(tmp_path / "run"),
        "model": {"path": str(tiny_model), "max_length": 96},
        "pool": {"path": lines(tmp_path / "pool.jsonl", tiny.chats(60))},
        "targets": {
            "t": {
                "dev": lines(tmp_path / "dev.jsonl", tiny.chats(5, 50)),
                "test": lines(tmp_path / "test.jsonl", tiny.chats(8, 70)),
            }
        },
        "features": {"rds": {"extractor": "embedding"}, "trim": {"extractor": "trim"}},
        "methods": {
            "random": {"selector": "random"},
            "balanced": {"selector": "balanced"},
            "length": {"selector": "length"},
            "rds+": {"selector": "similarity", "x": "rds"},
            "trim": {"selector": "topk", "x": "trim"},
        },
        "budget": "20%",
        "seeds": [0, 1],
        "train": {"tokens": 300, "batch_tokens": 100},
    }
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(plan))
    return file


def cli(*arguments, code=0):
    done = subprocess.run([sys.executable, "-m", "llmselect", *map(str, arguments)], capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stderr
    return done


MISTAKES = [
    ("train.tokns=5", "train.tokns: unknown key. Did you mean 'tokens'?"),
    ("methods.trim.selector=topkk", "methods.trim.selector: unknown selector 'topkk'. Did you mean 'topk'?"),
    ("methods.trim.selector=trim", "unknown selector 'trim'. 'trim' is an extractor: name it under features"),
    ("methods.trim.selector=less", "'less' is the extractor gradient read by the selector similarity"),
    ("methods.trim.selector=rs2", "'rs2' is a schedule: it takes rows during training: train.schedule"),
    ("seeds=3", "seeds: expected a list, got 3 (int); for one value type [3]"),
    ("methods.trim.recude=max", "methods.trim.recude: unknown key. Did you mean 'reduce'?"),
    ("methods.trim.x=trimm", "methods.trim.x: no feature 'trimm'. Did you mean 'trim'?"),
    ("features.rds.extractor=embeding", "unknown extractor 'embeding'. Did you mean 'embedding'?"),
    ("features.rds.pooling=avg", "features.rds.pooling"),
    ("pool.path=nowhere.jsonl", "pool.path: no file or folder nowhere.jsonl"),
    ("targets.t.test=/no/such.jsonl", "targets.t.test: no file or folder /no/such.jsonl"),
    ("model.path=./no-model", "model.path: ./no-model"),
    ("train.sft.learning_rat=1", "train.sft.learning_rat: SFTConfig has no such setting. Did you mean 'learning_rate'?"),
    ("train.sft.max_steps=3", "use train.tokens"),
    ("warmup.train.sft.max_steps=3", "warmup.train.sft.max_steps: llmselect sets this itself; use warmup.train.tokens"),
    ("color.train.lora.rr=3", "color.train.lora.rr: LoraConfig has no such setting"),
    ("budget=0", "budget: 0 is not a positive budget"),
    ("budget=-1", "budget: -1 is not a positive budget"),
    ("budget=200%", "budget: 200% is more than the whole pool"),
    ("budget=lots", "budget: 'lots' is not a budget"),
    ("seeds=[0,0]", "seeds:"),
    ("nonsense", "is not an override"),
]


@pytest.mark.parametrize(("override", "message"), MISTAKES)
def test_mistakes_are_one_line_before_anything_loads(recipe, override, message):
    with pytest.raises(UsageError) as error:
        load_recipe(recipe, [override])
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (recipe.parent / "run").exists()


@pytest.mark.parametrize("override", ["budget=lots", "train.tokns=5"])
def test_exit_code_two_and_no_traceback(recipe, override):
    done = cli("run", recipe, override, code=2)
    assert done.stderr.startswith("llmselect: ") and done.stderr.count("\n") == 1 and done.stdout == ""


def test_a_missing_recipe_and_bad_yaml(tmp_path):
    assert "no recipe at" in cli("run", tmp_path / "absent.yaml", code=2).stderr
    (tmp_path / "recipes/mine").mkdir(parents=True)
    (tmp_path / "recipes/mine/recipe.yaml").touch()
    with chdir(tmp_path), pytest.raises(UsageError, match=r"no recipe at recipe/mine; .* Did you mean 'recipes/mine'\?"):
        load_recipe("recipe/mine")
    (tmp_path / "bad.yaml").write_text("name: a\nname: b\n")
    assert "line 2" in cli("run", tmp_path / "bad.yaml", code=2).stderr


@pytest.mark.parametrize(("override", "key"), [("budget=5000", "budget"), ("methods.trim.budget=61", "methods.trim.budget")])
def test_a_budget_larger_than_the_pool_costs_no_feature(recipe, override, key):
    done = CliRunner().invoke(app, ["select", str(recipe), override])
    rows = len(np.load(recipe.parent / "run/pool/usable.npy"))
    assert str(done.exception) == f"{key}: a budget of {override.partition('=')[2]} rows is more than the {rows} rows of the pool"
    assert not FeatureStore(recipe.parent / "run/features").names()


def test_a_setting_typed_as_an_option_is_told_how_it_is_typed(recipe):
    done = CliRunner().invoke(app, ["run", str(recipe), "--budget", "5%"])
    assert done.exit_code == 2
    assert "No such option: --budget. A setting of the recipe is typed without dashes: budget=…" in done.output


@pytest.mark.timeout(420)
def test_run_from_pool_to_table_and_again(recipe):
    out = recipe.parent / "run"
    first = cli("run", recipe)
    for method in ("base", "random", "balanced", "length", "rds+", "trim", "full"):
        assert f"| {method} |" in first.stdout
    assert first.stdout.splitlines()[-1] == f"report: {out / 'report.html'}" and "<title>cli" in (out / "report.html").read_text()
    table = json.loads((out / "results.json").read_text())["rows"]
    account = json.loads((out / "rows.json").read_text())
    assert 40 < account["usable"] < 60, "some rows are longer than max_length"
    assert {row["rows"] for row in table if row["method"] not in ("base", "full")} == {account["usable"] // 5}
    trained = [json.loads(f.read_text())["result"] for f in out.glob("adapters/*/*/train.json")]
    assert len(trained) == 12 and {(t["tokens"], t["steps"]) for t in trained} == {(300, 3)}
    before = {f: f.read_bytes() for f in out.rglob("*") if f.is_file() and f.name != "timings.json"}
    again = cli("run", out / "config.yaml")
    assert again.stdout == first.stdout
    assert {f: f.read_bytes() for f in out.rglob("*") if f.is_file() and f.name != "timings.json"} == before
    pool = account["pool"]
    assert pool["read"] == pool["kept"] + pool["invalid"] + pool["duplicates"] + pool["contaminated"] == 60
    compared = json.loads(cli("compare", out, "--json").stdout)
    i, j = (compared["names"].index(f"run/{m}/seed-0") for m in ("trim", "rds+"))
    assert compared["overlap"][i][i] == 1 and compared["overlap"][i][j] == compared["overlap"][j][i] < 1
    assert "overlap" in cli("compare", out).stdout


def test_a_changed_method_is_refused_not_reused(recipe):
    cli("select", recipe)
    done = cli("select", recipe, "methods.trim.reduce=max", code=1)
    assert "config.reduce: round_robin -> max" in done.stderr.replace('"', "")


def test_dry_run_writes_nothing_and_tells_rows_bytes_minutes(recipe):
    found = json.loads(cli("run", recipe, "--dry-run", "--json").stdout)
    assert found["pool_rows"] == 60 and found["selected_rows"] == found["usable_rows"] // 5 and found["trainings"] == 12
    row_bytes = 48 * 2 + 2 + 4 * (3 * 4 + 2) + 5 * 4  # rds, trim with its evidence, tokens
    assert found["feature_bytes"] == pytest.approx(found["usable_rows"] * row_bytes, rel=0.6)
    assert found["extract_minutes"] >= 0 and not (recipe.parent / "run").exists()


def test_list_and_show():
    listed = json.loads(cli("list", "--json").stdout)
    assert {"random", "balanced", "length", "topk", "similarity"} <= set(listed["selector"])
    assert {"embedding", "loss", "trim", "tokens"} <= set(listed["extractor"])
    shown = cli("show", "trim").stdout
    assert "2510.07118" in shown and "penalty" in shown and "Objective" in shown
    assert "Did you mean 'trim'?" in cli("show", "trimm", code=2).stderr
    assert "Did you mean 'dsir'?" in cli("show", "DSIR", code=2).stderr, "papers write their methods in capitals"
