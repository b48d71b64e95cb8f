"""What a push holds: rows in rank order, manifest, cards that nothing in the data can break, features, adapters."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

import tiny
from hub_server import HOSTILE, TOKEN
from llmselect import cli, hub
from llmselect.errors import LlmselectError, UsageError
from llmselect.hub import card, citations, origin
from llmselect.pool import load_pool
from llmselect.prepare import prepare
from llmselect.recipe import load_recipe
from llmselect.registry import extractors, selectors
from llmselect.selection import Selection
from llmselect.selectors.random import Random
from llmselect.stages import Run, extract_stage, select_stage
from llmselect.store import FeatureStore

pytest_plugins = ["hub_server"]


def front(text):
    from huggingface_hub import DatasetCard

    return DatasetCard(text).data.to_dict()


def test_what_is_pushed_loads_back_in_rank_order(hub_run, server, tmp_path):
    from datasets import load_dataset

    done = CliRunner().invoke(cli.app, ["push", str(hub_run.folder), "subset", "--json"], catch_exceptions=False)
    (report,) = json.loads(done.stdout)
    assert report["repo"] == "me/subset" and report["pushed"]["changed"] and done.exit_code == 0
    repo = server.checkout("dataset", "me/subset", tmp_path / "repo")
    assert {str(f.relative_to(repo)): f.stat().st_size for f in repo.rglob("*") if f.is_file()} == report["files"]
    head = front((repo / "README.md").read_text("utf-8"))
    names = [one["config_name"] for one in head["configs"]]
    # trim leaves nothing to chance: its second seed would be the same rows again
    assert names == ["random-seed-0-25pct", "random-seed-1-25pct", "trim+-seed-0-25pct", "scores"]
    selection = Selection.load(hub_run.folder / "selections" / "trim+" / "seed-0")
    expected = selection.to_dataset(hub_run.pool)
    file = str(repo / "data" / "trim+-seed-0-25pct.parquet")
    rows = load_dataset("parquet", data_files=file, split="train", cache_dir=str(tmp_path / "c"))
    assert rows["rank"][:] == list(range(len(selection))) and rows["id"][:] == list(selection.ids)
    assert [rows[name][:] for name in ("messages", "source", "license")] == [
        expected[name][:] for name in ("messages", "source", "license")
    ]
    np.testing.assert_array_equal(np.array(rows["evidence_top_token"][:]), selection.evidence["top_token"])
    by_card = load_dataset(str(repo), "trim+-seed-0-25pct", split="train", cache_dir=str(tmp_path / "c"))
    assert by_card["id"][:] == rows["id"][:]
    scores = load_dataset(str(repo), "scores", split="train", cache_dir=str(tmp_path / "c"))
    assert scores.column_names == ["id", *names[:3]]
    assert scores["id"][:] == hub_run.pool["id"][:]
    np.testing.assert_allclose(np.array(scores["trim+-seed-0-25pct"][:]), selection.scores)


def test_the_manifest_pins_every_revision(hub_run, server, tmp_path):
    from llmselect import atomic, config
    from llmselect.engine.backbone import weights_digest
    from llmselect.engine.extraction import content_digest

    hub.push_run(hub_run.folder, "me/subset", base_model="org/tiny")
    repo = server.checkout("dataset", "me/subset", tmp_path / "repo")
    pins = json.loads((repo / "llmselect.json").read_text())
    assert pins["pool"] == {"name": "pool.jsonl", "dataset": None, "revision": None, "rows": len(hub_run.pool),
                            "digest": content_digest(hub_run.pool)}  # fmt: skip
    assert pins["model"] == {"name": "org/tiny", "weights": [weights_digest(hub_run.recipe.model.path)]}
    assert {name: atomic.sha256_file(repo / name) for name in pins["sha256"]} == pins["sha256"]
    assert set(pins["sha256"]) == {str(f.relative_to(repo)) for f in repo.rglob("*") if f.is_file()} - {
        "llmselect.json",
        "README.md",
    }
    stored = json.loads((hub_run.folder / "selections/trim+/seed-0/selection.json").read_text())
    made = pins["selections"]["trim+-seed-0-25pct"]
    assert made["checksum"] == stored["checksum"] and made["seed"] == 0 and made["budget"] == {"fraction": 0.25}
    assert pins["features"]["trim"]["fingerprint"] == config.fingerprint(dict(hub_run.store.open("trim").spec))
    assert pins["versions"]["torch"] and pins["versions"]["llmselect"] == "0.1.0"
    places = {"pool.path": hub_run.recipe.pool.path, "model.path": hub_run.recipe.model.path, "out": tmp_path,
              "targets.t.dev": hub_run.recipe.targets["t"].dev}  # fmt: skip
    again = load_recipe(repo / "recipe.yaml", [f"{key}={value}" for key, value in places.items()])
    assert again.methods == hub_run.recipe.methods and again.budget == hub_run.recipe.budget


def test_hostile_sources_leave_the_card_whole_and_no_folder_of_ours_leaks(hub_run, server):
    hub.push_run(hub_run.folder, "me/subset", features=True, adapters=True, base_model="org/tiny")
    for kind in ("dataset", "model"):
        tree = server.repos[kind, "me/subset"].tree()
        told = {name: content.decode() for name, content in tree.items() if name.endswith((".md", ".json", ".yaml"))}
        for name, text in told.items():
            assert not [
                bad for bad in (str(hub_run.folder.parent), "/home/ann", hub_run.recipe.model.path, TOKEN) if bad in text
            ], name
            here = {f"/{Path(place).resolve().parts[1]}/" for place in (hub_run.folder, __file__)}
            assert not [place for place in here if place in text], name  # whatever this machine calls its top folders
    text = server.repos["dataset", "me/subset"].tree()["README.md"].decode()
    head = front(text)
    assert (head["license"], head["license_name"]) == ("other", "mixed") and "language" not in head
    assert head["size_categories"] == ["n<1K"] and "source_datasets" not in head and "topk" in head["tags"]
    assert "<script" not in text and "![i]" not in text
    lines = text.split("## Sources")[1].split("## Licence")[0].strip().splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 2 + len(HOSTILE) and {line.count("|") for line in table} == {5}
    assert any(line.startswith("| x --- license: mit | ") for line in table)
    shares = [[float(cell.split()[0]) for cell in line.split("|")[2:5]] for line in table[2:]]
    np.testing.assert_allclose(np.sum(shares, axis=0), 100, atol=0.3)
    licences = dict(line.strip("| ").split(" | ") for line in text.split("## Licence")[1].split("\n") if line.startswith("| "))
    union = np.unique(
        np.concatenate([Selection.load(f.parent).indices for f in hub_run.folder.glob("selections/*/*/selection.json")])
    )
    stated = [one.lower().replace(" ", "-") for one in hub_run.pool.select(union)["license"]]
    assert {name: int(licences[name]) for name in ("mit", "cc-by-4.0")} == {n: stated.count(n) for n in ("mit", "cc-by-4.0")}
    png = server.repos["dataset", "me/subset"].tree()["source-mix.png"]
    assert png.startswith(b"\x89PNG") and "![Shares" in text and "2510.07118" in text and "@misc{" in text


def test_a_dry_run_shows_card_and_files_and_contacts_nothing(hub_run, server):
    arguments = ["push", str(hub_run.folder), "me/subset", "--dry-run", "--features", "--adapters", "--base-model", "org/tiny"]
    done = CliRunner().invoke(cli.app, arguments, catch_exceptions=False)
    assert done.exit_code == 0 and server.seen == []
    dataset, model = hub.push_run(hub_run.folder, "me/subset", features=True, adapters=True, base_model="org/tiny")
    assert dataset.card in done.stdout and model.card in done.stdout
    for name, size in {**dataset.files, **model.files}.items():
        assert f"{size:>12,}  {name}\n" in done.stdout
    assert dataset.files.keys() == server.repos["dataset", "me/subset"].tree().keys()


def test_features_are_a_store_again(hub_run, server, tmp_path):
    hub.push_run(hub_run.folder, "me/subset", features=True)
    store = FeatureStore(server.checkout("dataset", "me/subset", tmp_path) / "features")
    assert store.names() == hub_run.store.names()
    np.testing.assert_array_equal(np.asarray(store["trim"]), np.asarray(hub_run.store["trim"]))
    assert store["trim"].ids[0:3] == hub_run.store["trim"].ids[0:3]


def test_features_computed_on_demand_are_told_of_and_pushed(hub_run, tmp_path):
    run = shutil.copytree(hub_run.folder, tmp_path / "run")
    (run / "features/lazy").mkdir()
    (run / "features/trim").rename(run / "features/lazy/trim")
    (run / "features/lazy/trim/00000.json").unlink()  # most rows were never asked for
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("extractor: trim", "extractor: trim\n    lazy: true"))
    (report,) = hub.push_run(run, "me/subset", features=True, dry_run=True)
    assert "| trim | trim |" in report.card and "lazy: true" in report.card
    assert "features/lazy/trim/spec.json" in report.files and "features/tokens/00000.safetensors" in report.files
    (run / "features/tokens/00000.json").unlink()
    with pytest.raises(LlmselectError, match=r"feature 'tokens' lacks shards \[0\]; extract first"):
        hub.push_run(run, "me/subset", features=True, dry_run=True)


def test_adapters_are_a_model_that_names_its_base_and_its_data(hub_run, server, tmp_path):
    from peft import PeftConfig
    from safetensors.numpy import load_file

    with pytest.raises(UsageError, match=r"nobody else has; give its id on the Hub: --base-model"):
        hub.push_run(hub_run.folder, "me/subset", adapters=True)
    with pytest.raises(UsageError, match=r"is a folder here|is no Hub id"):
        hub.push_run(hub_run.folder, "me/subset", adapters=True, base_model=hub_run.recipe.model.path)
    assert server.seen == []
    reports = hub.push_run(hub_run.folder, "me/subset", methods=["trim+"], adapters=True, base_model="org/tiny")
    assert [one.pushed.url for one in reports][1].startswith(f"{server.url}/me/subset/commit/")
    repo = server.checkout("model", "me/subset", tmp_path / "model")
    assert {f.parent.name for f in repo.glob("*/*/adapter_model.safetensors")} == {"seed-0", "seed-1"}
    assert not list(repo.rglob("checkpoints")) and not (repo / "random").exists()
    head = front((repo / "README.md").read_text())
    assert head["base_model"] == "org/tiny" and head["datasets"] == ["me/subset"] and "license" not in head
    here, there = hub_run.folder / "adapters/trim+/seed-0", repo / "trim+/seed-0"
    assert PeftConfig.from_pretrained(str(there)).base_model_name_or_path == "org/tiny"
    mine, theirs = (load_file(f / "adapter_model.safetensors") for f in (here, there))
    assert mine.keys() == theirs.keys() and all((mine[name] == theirs[name]).all() for name in mine)
    assert json.loads((there / "train.json").read_text())["key"]["model"] == "org/tiny"
    again = hub.push_run(hub_run.folder, "me/subset", methods=["trim+"], adapters=True, base_model="org/tiny")
    assert [one.pushed.changed for one in again] == [False, False]


def hand(pool, rows=3, **more):
    return Random().select(rows, seed=1, ids=pool["id"], **more), pool


@pytest.mark.parametrize(
    ("stated", "wanted"),
    [
        (["MIT", "mit"], {"license": "mit"}),
        (["My: own | *terms*"], {"license": "other", "license_name": "my-own-terms"}),
        (["mit", None], {"license": "other", "license_name": "mixed"}),
        ([None], {}),
    ],
)
def test_the_licence_of_a_subset_is_never_invented(stated, wanted):
    pool = load_pool([{"messages": chat, "license": stated[i % len(stated)]} for i, chat in enumerate(tiny.chats(12))])
    selection, pool = hand(pool, 12)
    report = selection.push_to_hub("me/subset", pool, dry_run=True)
    assert {k: v for k, v in front(report.card).items() if k.startswith("license")} == wanted
    assert ("so none is given here" in report.card) == (not wanted) and ("license" in pool.column_names) == bool(wanted)
    assert ("| not stated | 6 |" in report.card) == (None in stated and bool(wanted))


def cache_card(tmp_path, revision, head):
    """The card of dataset org/pool, as the client leaves it in its cache."""
    cached = tmp_path / "cache" / "datasets--org--pool"
    (cached / "snapshots" / revision).mkdir(parents=True)
    (cached / "snapshots" / revision / "README.md").write_text(f"---\n{head}\n---\n# pool\n")
    (cached / "refs").mkdir(exist_ok=True)
    (cached / "refs" / "main").write_text(revision)


@pytest.mark.parametrize(
    ("head", "wanted"),
    [
        ("license: odc-by\nlanguage: [en]", {"license": "odc-by", "language": ["en"]}),
        ("license: other\nlicense_name: tulu\nlanguage: [en, de]", {"license": "other", "license_name": "tulu"}),
        ("x: [", {}),
    ],
)
def test_a_pool_of_the_hub_hands_on_what_its_card_states(server, tmp_path, head, wanted):
    cache_card(tmp_path, "abc123", head)
    selection, pool = hand(load_pool([{"messages": chat} for chat in tiny.chats(12)]))
    report = selection.push_to_hub("subset", pool, source="org/pool")
    told = front(report.card)
    assert told["source_datasets"] == ["org/pool"]
    assert {k: told[k] for k in ("license", "license_name", "language") if k in told} == wanted
    pins = json.loads(server.repos["dataset", "me/subset"].tree()["llmselect.json"])
    assert pins["pool"]["revision"] == "abc123" and pins["licence"]["id"] == wanted.get("license")


def test_a_run_keeps_the_revision_that_it_read(server, hub_run, tmp_path, monkeypatch):
    rows = [{"messages": chat} for chat in tiny.chats(12)]
    monkeypatch.setattr("llmselect.readers._hub", lambda name, split, subset: rows)
    cache_card(tmp_path, "old", "license: odc-by")
    plain = {"name": "r", "out": str(tmp_path / "run"), "model": {"path": hub_run.recipe.model.path, "max_length": 96},
             "pool": {"path": "org/pool"}, "targets": {"t": {"dev": hub_run.recipe.targets["t"].dev}},
             "methods": {"random": {"selector": "random"}}, "budget": 4}  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(json.dumps(plain))
    run = Run(load_recipe(tmp_path / "recipe.yaml"))
    for stage in (prepare, extract_stage, select_stage):
        stage(run)
    cache_card(tmp_path, "new", "license: mit")
    (report,) = hub.push_run(run.folder, "me/subset", dry_run=True)
    config = run.folder / "config.yaml"
    config.write_text(config.read_text().replace(f"path: {hub_run.recipe.model.path}", "path: org/base"))
    with pytest.raises(UsageError, match=r"the run's model is org/base; leave the option out"):
        hub.push_run(run.folder, "me/subset", base_model="org/tiny", dry_run=True)
    assert f"{len(run.pool)} rows, revision old." in report.card and front(report.card)["license"] == "odc-by"
    with pytest.raises(UsageError, match=r"'id'; give the dataset that llmselect.load_pool returned"):
        Selection(np.array([1]), 12).push_to_hub("me/subset", run.pool.remove_columns("id"), dry_run=True)
    assert "pool.path=PATH" not in report.card and "model.path=PATH targets.t.dev=PATH" in report.card


def test_a_selection_made_by_hand_is_pushed_too(server, tmp_path):
    import pyarrow.parquet as pq

    pool = load_pool([{"messages": chat} for chat in tiny.chats(12)])
    Selection(np.array([7, 2, 5]), 12).push_to_hub("me/subset", pool, private=True)
    repo = server.checkout("dataset", "me/subset", tmp_path)
    table = pq.read_table(repo / "data" / "selection-3rows.parquet")
    assert table["id"].to_pylist() == [pool[i]["id"] for i in (7, 2, 5)] and table["rank"].to_pylist() == [0, 1, 2]
    assert not (repo / "scores.parquet").exists() and server.repos["dataset", "me/subset"].private


def test_without_matplotlib_the_table_stands_alone(hub_run, monkeypatch, caplog):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    (report,) = hub.push_run(hub_run.folder, "me/subset", dry_run=True)
    assert "source-mix.png" not in report.files and "![" not in report.card and "| source | pool |" in report.card
    assert "llmselect[report]" in caplog.text


def test_citations_are_those_of_the_docstrings():
    found = citations.bibtex([(selectors, "random"), (selectors, "mona"), (extractors, "trim"), (selectors, "gone")])
    assert found.count("@misc") == 2 and "eprint = {2503.15573}" in found and "note = {method: trim}" in found
    assert "title = {{TRIM: Token-wise Attention-Derived Saliency for Data-Efficient Instruction Tuning}}" in found


def test_names_and_folders_are_made_safe():
    assert origin.clean(["/a/b/c", "key=/home/me/x.json", "https://h.co/a/b", "and/or", 5]) == ["c", "key=x.json", "https://h.co/a/b",
                                                                                             "and/or", 5]  # fmt: skip
    assert card.cell("a\n|<b>`\x00\u2028[") == "a &#124;&#60;b&#62;&#96; &#91;"
    assert card.fenced("a\n````\nb", "x").startswith("`````x\n")
    sizes = {0: "n<1K", 999: "n<1K", 1000: "1K<n<10K", 10**5: "100K<n<1M", 10**12: "n>1T"}
    assert {rows: card.size_category(rows) for rows in sizes} == sizes
    loaded = yaml.safe_load(card.render("{{ head }}", {"license_name": "a\n---\nb: 1\x85", "language": ["no"]}))
    assert loaded == {"license_name": "a\n---\nb: 1\x85", "language": ["no"]}
