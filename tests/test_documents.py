"""Every code block of README, CONTRIBUTING and `recipes/` is run, or checked as far as it goes without the Hub."""

from __future__ import annotations

import gzip
import json
import os
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import documents
import tiny
from documents import Block, blocks, commands

pytest_plugins = ["hub_server"]
RUN = ("list", "show", "compare", "ensemble", "report", "generate")
NOT_RUN = {
    "run": "trains for minutes; tests/test_cli.py runs it, with --dry-run it is run here",
    "extract": "tests/test_resume.py runs it",
    "select": "tests/test_cli.py runs it",
    "train": "tests/test_train.py runs what it does",
    "evaluate": "is run under its other name",
    "refine": "tests/test_refine_models.py runs it",
    "benchmark": "tests/test_benchmark.py runs it",
    "leaderboard": "tests/test_benchmark.py runs it",
    "lm-eval": "tests/test_lm_eval.py runs it",
    "push": "needs the Hub; with --dry-run it is run here, tests/test_hub.py runs it against a server",
    "sae": "tests/test_sae.py runs it",
    "doctor": "measures this machine for seconds; its own tests run it",
    "completion": "its own tests read the script that it prints",
    "hf-extension": "writes into the home folder; its own tests give it another",
}  # fmt: skip
ELSEWHERE = {"recipes/dynamic/README.md": "tests/test_dynamic.py runs it in a process of its own, and looks at what it prints"}
SMALLER = (("tokens=30000", "tokens=150"), ("clusters=32", "clusters=3, probe=1, max_new_tokens=4"),
           ('store["rds"], 1000', 'store["rds"], 12'))  # fmt: skip


def test_every_block_has_a_language_that_is_tested():
    assert {block.language for block in blocks()} <= {"bash", "python", "yaml", "toml", ""}
    pictures = [str(block) for block in blocks("") if any(word in block.text for word in ("llmselect ", "import ", "make "))]
    assert pictures == [], "code without a language"
    assert len(blocks("bash")) > 15 and len(blocks("python")) > 8 and len(blocks("yaml")) > 25


def lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt") if path.suffix == ".gz" else path.open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


RECIPE = """
name: demo
out: runs/demo
model: {path: MODEL}
pool: {path: pool.jsonl.gz}
targets: {gsm8k: {dev: gsm8k/dev.jsonl}}
features: {rds: {extractor: embedding}, trim: {extractor: trim}}
methods: {random: {selector: random}, rds+: {selector: similarity, x: rds}, trim: {selector: topk, x: trim},
          less: {selector: similarity, x: rds, combine: mean}}
budget: 20%
train: {tokens: 100, batch_tokens: 50}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_model):
    """A folder in which the names that the documents use exist: MODEL, RECIPE, pool.jsonl.gz, gsm8k/…, runs/…, DIR."""
    import shutil

    from llmselect import prepare, stages
    from llmselect.recipe import load_recipe
    from llmselect.train import Train, finetune

    folder = tmp_path_factory.mktemp("place")
    chats = [{"messages": chat, "source": f"s{i % 3}"} for i, chat in enumerate(tiny.chats(40))]
    lines(folder / "pool.jsonl.gz", chats)
    lines(folder / "gsm8k/dev.jsonl", [{"messages": chat} for chat in tiny.chats(4, 50)])
    lines(folder / "gsm8k/test.jsonl", [{"messages": chat} for chat in tiny.chats(4, 70)])
    lines(folder / "bash.jsonl", [{"messages": chat} for chat in tiny.chats(4, 60)])
    asked = [{"id": str(i), "messages": chat, "answer": "7", "choices": []} for i, chat in enumerate(tiny.chats(2, 3))]
    lines(folder / "targets/gsm8k/test.jsonl.gz", asked)
    lines(folder / "prompts.jsonl", asked)
    (folder / "RECIPE").write_text(RECIPE)
    (folder / "MODEL").symlink_to(tiny_model)
    before = Path.cwd()
    os.chdir(folder)
    try:
        run = stages.Run(load_recipe("RECIPE"))
        for stage in (prepare.prepare, stages.extract_stage, stages.select_stage):
            stage(run)
        finetune(run.pool.select(range(4)), "MODEL", Path("DIR"), Train(tokens=40, batch_tokens=40), seed=0)
    finally:
        os.chdir(before)
    for name in ("a", "b"):
        shutil.copytree(folder / "runs/demo", folder / "runs" / name)
    return folder


@pytest.mark.parametrize("block", blocks("yaml"), ids=str)
def test_recipes_in_documents_are_recipes(block: Block, place, monkeypatch):
    from llmselect import config, strict_yaml
    from llmselect.recipe import Recipe

    monkeypatch.chdir(place)
    given = strict_yaml.parse_yaml(block.text, str(block))
    whole = {"model", "pool", "targets", "methods", "name"} <= set(given)
    base = strict_yaml.parse_yaml(RECIPE, "RECIPE")
    base["targets"]["bash"] = {"dev": "bash.jsonl"}
    features = {**base["features"], **given.get("features", {})}  # a part of a recipe may use what stands in another part
    recipe = config.from_dict(Recipe, given if whole else {**base, **given, "features": features})
    recipe.check()  # places on the Hub are not asked for; those on disk must be there
    assert recipe.methods


@pytest.mark.parametrize("block", blocks("bash"), ids=str)
def test_commands_can_be_typed(block: Block, place, monkeypatch):
    found = [inner for words in commands(block.text) for inner in documents.check(words)]
    monkeypatch.chdir(place)
    monkeypatch.setenv("COLUMNS", "120")
    for words in found:
        assert words[0] in (*RUN, *NOT_RUN), f"{words[0]}: say in this test whether it is run, or why not"
        dry = "--dry-run" in words and (place / words[1]).exists()
        if words[0] in RUN or dry:
            from llmselect.cli import app

            told = CliRunner().invoke(app, words)
            assert told.exit_code == 0 and told.stdout, f"{words}: {told.output} {told.exception!r}"


@pytest.mark.parametrize("file", sorted({block.file for block in blocks("python") if block.file not in ELSEWHERE}))
def test_python_runs(file, place, monkeypatch, server):
    """The blocks of a document one after the other in one namespace, in which the finished run is open as `store` and `pool`."""
    import matplotlib

    import llmselect as ls

    matplotlib.use("Agg")
    monkeypatch.chdir(place)
    names = {"pool": ls.load_pool("pool.jsonl.gz"), "store": ls.FeatureStore("runs/demo/features"), "__name__": "document"}
    for block in blocks("python"):
        if block.file == file and not block.text.startswith('"""'):  # a module: below, as a plug-in
            text = block.text
            for theirs, ours in SMALLER:
                text = text.replace(theirs, ours)
            exec(compile(text, str(block), "exec"), names)
    if file == "README.md":
        assert [tuple(repo) for repo in server.repos] == [("dataset", "me/subset")], "the last block pushed"
        assert names["answers"][0].finish in ("stop", "length")


def test_the_method_of_contributing_works_as_a_plug_in(place, tmp_path, monkeypatch):
    from llmselect.cli import app
    from llmselect.registry import selectors
    from llmselect.selection import Selection
    from llmselect.store import FeatureStore

    code, entry = [next(b.text for b in blocks(lang) if b.file == "CONTRIBUTING.md") for lang in ("python", "toml")]
    package = tomllib.loads(entry)["project"]
    (tmp_path / "central.py").write_text(code)
    about = tmp_path / "llmselect_central-0.1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package['name']}\nVersion: {package['version']}\n")
    told = [f"[{group}]\n{name} = {where}\n" for group, one in package["entry-points"].items() for name, where in one.items()]
    (about / "entry_points.txt").write_text("".join(told))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(place)
    before = dict(selectors._classes)
    vars(selectors).pop("_loaded")
    try:
        for words in (["show", "central"], ["select", "RECIPE", "methods.central.selector=central", "methods.central.x=rds"]):
            said = CliRunner().invoke(app, words)
            assert said.exit_code == 0, said.exception
    finally:
        selectors._classes.clear()
        selectors._classes.update(before)
        vars(selectors).pop("_loaded", None)
        sys.modules.pop("central", None)
    x = np.asarray(FeatureStore("runs/demo/features")["rds"], np.float64)
    nearest = np.argsort(np.linalg.norm(x - x.mean(0), axis=1), kind="stable")[:8]
    assert sorted(Selection.load(Path("runs/demo/selections/central/seed-0")).indices) == sorted(nearest)
