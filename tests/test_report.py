"""The report of a run: what its page holds is what the run holds, and nothing from data becomes part of the page."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

import tiny
from llmselect import cli
from llmselect.errors import UsageError
from llmselect.prepare import prepare
from llmselect.recipe import load_recipe
from llmselect.report import page, write_report
from llmselect.selection import Selection
from llmselect.stages import Run, extract_stage, select_stage
from reported import large_run

SCRIPT = "<script>alert(1)</script>"
HOSTILE = [SCRIPT, "</script><img src=x onerror=alert(2)>", "a | b | c", "שלום עולם \u202e abc", "x" * 10_000,
           "line\u2028separator\u2029end", "<!-- <script> ]]> &lt;b&gt; {{ 7*7 }}", '"\'`${alert(3)}']  # fmt: skip
METHODS = {
    "random": {"selector": "random"},
    "rds+": {"selector": "similarity", "x": "rds"},
    "trim": {"selector": "topk", "x": "trim"},
    "mona": {"selector": "mona", "x": "sae"},
    "kmq": {"selector": "kmq", "x": "rds", "quality": "loss.nll", "clusters": 4},
    "quad": {"selector": "quad", "x": "rds", "quality": "trim"},
    "auto": {"selector": "tarot_auto", "x": "rds", "folds": 3, "budget": "50%"},
    "quota": {"selector": "similarity", "x": "rds", "limits": {"quotas": {"t": 0.5, "u": 0.5}}},
}


def lines(path: Path, chats: list) -> str:
    rows = [json.dumps({"messages": c, "source": SCRIPT if i % 3 else f"s{i % 2}"}) + "\n" for i, c in enumerate(chats)]
    path.write_text("".join(rows))
    return str(path)


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_model) -> Run:
    """A finished run whose pool, sources and targets hold what should break a page."""
    folder = tmp_path_factory.mktemp("report")
    answer = lambda i, text: [{"role": "user", "content": f"{i} {text}"}, {"role": "assistant", "content": text}]  # noqa: E731
    chats = tiny.chats(40) + [answer(i, text) for i, text in enumerate(HOSTILE)]
    plan = {
        "name": f'demo {SCRIPT} & "more"',
        "out": str(folder / "run"),
        "model": {"path": str(tiny_model), "max_length": 96},
        "pool": {"path": lines(folder / "pool.jsonl", chats), "overlong": "truncate"},
        "targets": {
            "u": {"dev": lines(folder / "u.jsonl", tiny.chats(4, 50))},
            "t": {"dev": lines(folder / "t.jsonl", [*tiny.chats(3, 60), answer("dev", SCRIPT)])},
        },
        "sae": {"tokens": 3000, "k": 4, "batch_tokens": 64, "buffer_tokens": 512, "held_out_rows": 8},
        "features": {"rds": {"extractor": "embedding"}, "trim": {"extractor": "trim"}, "loss": {"extractor": "loss"},
                     "sae": {"extractor": "sae", "max_fvu": None}},
        "methods": METHODS,
        "budget": 12,
        "seeds": [0, 1],
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(json.dumps(plan))
    made = Run(load_recipe(folder / "recipe.yaml"))
    for stage in (prepare, extract_stage, select_stage):
        stage(made)
    row = {"method": "trim", "rows": 12, "tokens": 300, "nll": 2.5, "low": 2.25, "high": 2.75, "sd": None, "difference": -0.5,
           "difference_low": -0.625, "difference_high": -0.375, "tasks": {"t": 2.5}, "select_seconds": 0.1,
           "train_seconds": None}  # fmt: skip
    (made.folder / "results.json").write_text(json.dumps({"rows": [row], "seeds": [0, 1]}))
    write_report(made)
    return made


class Parsed(HTMLParser):
    """Start tags with their attributes, and the text inside each kind of element."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.tags, self.open, self.text = [], [], {}
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img", "br", "input"):
            self.open.append(tag + "".join(f"#{v}" for k, v in attrs if k == "id" and tag == "script"))

    def handle_endtag(self, tag):
        self.open.pop()

    def handle_data(self, data):
        where = self.open[-1] if self.open else ""
        self.text[where] = self.text.get(where, "") + data


def parsed(file: Path) -> tuple[str, Parsed, dict]:
    text = file.read_text("utf-8")
    found = Parsed(text)
    return text, found, json.loads(found.text["script#data"])


def test_nothing_from_data_becomes_an_element_or_a_script(run):
    text, found, data = parsed(run.folder / "report.html")
    template = Parsed((page.HERE / "page.html").read_text("utf-8"))
    without = lambda tags: [(t, {k: v for k, v in a.items() if k != "content"}) for t, a in tags]  # noqa: E731
    # Every element is one of the template's, in its order: data adds none, and no attribute to any.
    template.tags = [t for t in template.tags if data["run"]["shown"] < data["run"]["rows"] or t[0] != "strong"]
    assert without(found.tags) == without(template.tags)
    assert [a for t, a in found.tags if t == "script"] == [{"type": "application/json", "id": "data"}, {}]
    start = text.index('id="data">') + len('id="data">')
    held = text[start : text.index("</script>", start)]
    assert not set("<>&\u2028\u2029") & set(held)
    outside = text.replace(held, "")
    for one in HOSTILE:
        assert one not in outside
    assert found.text["h1"] == run.recipe.name and found.text["title"].startswith(run.recipe.name)
    texts = {turn[1] for row in data["rows"]["text"] for turn in row}
    assert {one for one in HOSTILE if len(one) < 1000} <= texts, "hostile rows are on the page, as text"
    assert SCRIPT in data["sources"]["names"]


def test_the_page_asks_for_nothing_and_runs_only_its_own_script(run):
    text, found, _ = parsed(run.folder / "report.html")
    assert set(re.findall(r"https?://[^\s'\"<]*", text)) == {"http://www.w3.org/2000/svg"}
    assert all(a["href"].startswith("#") for _, a in found.tags if "href" in a)
    assert not [a for _, a in found.tags if {"src", "onclick", "style"} & set(a)]
    policy = next(a["content"] for t, a in found.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert page._digest(found.text["script"]) in policy and page._digest(found.text["style"]) in policy
    assert "unsafe" not in policy and "default-src 'none'" in policy
    assert str(run.folder.parent) not in text and run.recipe.model.path not in text, "no path of this machine"


def test_what_the_page_says_is_what_the_selections_hold(run):
    _, _, data = parsed(run.folder / "report.html")
    pool, cost = run.pool, np.asarray(run.store["tokens.supervised"])
    sources = np.array(pool["source"])
    assert data["rows"]["pool"] == list(range(len(pool))) and data["rows"]["id"] == list(pool["id"])
    assert data["rows"]["tokens"] == cost.tolist()
    seen = set()
    for view, why in zip(data["views"], data["why"], strict=True):
        for seed in view["seeds"]:
            seen.add((view["method"], seed))
            made = Selection.load(run.folder / "selections" / view["method"] / f"seed-{seed}")
            assert [data["rows"]["pool"][at] for at in view["at"]] == made.indices.tolist()
            assert view["ranks"] == list(range(len(made))) and view["tokens"] == cost[made.indices].sum()
            mix = [int((sources[made.indices] == name).sum()) for name in data["sources"]["names"]]
            assert view["sources"] == mix and sum(view["lengths"]) == len(made) == len(why["selected"])
        if made.scores is None:
            assert view["score"] is None and not view["rejects"]
            continue
        merged = made.scores.reshape(made.n, -1).max(1).astype(float)
        np.testing.assert_allclose([np.nan if s is None else s for s in view["score"]], merged[made.indices], rtol=1e-5)
        left = [row for row in np.argsort(-merged, kind="stable") if row not in made.indices and np.isfinite(merged[row])]
        assert view["reject_score"] == pytest.approx([merged[row] for row in left[:25]], rel=1e-5)
        assert sum(view["scores"]["pool"]) == np.isfinite(merged).sum()
    assert seen == {(method, seed) for method in METHODS for seed in (0, 1)}
    names = [view["name"] for view in data["views"]]
    i, j = names.index("trim"), names.index("rds+")
    one, other = (set(data["views"][k]["at"]) for k in (i, j))
    assert data["overlap"][i][j] == pytest.approx(len(one & other) / len(one | other), abs=1e-4)
    assert "random, seed 0" in names and "random, seed 1" in names, "seeds that differ are two selections"
    assert data["results"]["rows"][0]["low"] == 2.25


def entries(data: dict, name: str, kind: str) -> list:
    at = [view["name"] for view in data["views"]].index(name)
    return [[one for one in row if one["kind"] == kind] for row in data["why"][at]["selected"]]


def test_why_rows_were_picked(run, tiny_model):
    _, _, data = parsed(run.folder / "report.html")
    load = lambda method: Selection.load(run.folder / "selections" / method / "seed-0")  # noqa: E731
    rds, mona, trim = load("rds+").evidence, load("mona").evidence, load("trim").evidence
    told = [{one["name"]: one["row"] for one in row} for row in entries(data, "rds+", "target")]
    assert [row["nearest"] for row in told] == rds["nearest"].tolist()
    assert data["targets"][told[0]["nearest"]]["text"][0][1] == run.target["messages"][told[0]["nearest"]][0]["content"]
    for row, (table,) in enumerate(entries(data, "mona", "latents")):
        known = mona["latent"][row] >= 0
        assert [one[0] for one in table["rows"]] == mona["latent"][row][known].tolist()
        assert [one[1] for one in table["rows"]] == pytest.approx(mona["value"][row][known], abs=1e-4)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    for row, (heat,) in enumerate(entries(data, "trim", "heat")):
        group = int(trim["group"][row])
        assert heat["group"] == ["u", "t"][group], "columns of a feature are groups in the order of the targets"
        places = np.argsort(trim["top_position"][row, group])
        places = places[trim["top_position"][row, group][places] >= 0]
        marked = [part for part in heat["parts"] if part[1] is not None]
        assert [m[0] for m in marked] == [tokenizer.decode([t]) for t in trim["top_token"][row, group][places].tolist()]
        assert [m[1] for m in marked] == pytest.approx(trim["top_score"][row, group][places], abs=1e-3)
    groups = np.array(run.target["group"])
    quota = load("quota").evidence
    found = [next(one["row"] for one in row if one["name"] == "nearest") for row in entries(data, "quota", "target")]
    assert groups[found].tolist() == quota["quota"].tolist(), "a quota counts the rows of its own group"
    for method, name in (("kmq", "cluster"), ("quad", "reward"), ("auto", "layer")):
        view = next(v["name"] for v in data["views"] if v["method"] == method)
        values = [next(one["value"] for one in row if one["name"] == name) for row in entries(data, view, "number")]
        assert values == pytest.approx(load(method).evidence[name], rel=1e-4)


def test_tokens_are_numbers_without_the_tokenizer_that_made_them(run, tmp_path):
    moved = shutil.copytree(run.folder, tmp_path / "moved")
    config = (moved / "config.yaml").read_text()
    (moved / "config.yaml").write_text(config.replace(run.recipe.model.path, str(tmp_path / "gone")))
    trim = Selection.load(run.folder / "selections" / "trim" / "seed-0").evidence
    for row, (heat,) in enumerate(entries(parsed(write_report(moved))[2], "trim", "heat")):
        group = int(trim["group"][row])
        known = trim["top_token"][row, group][trim["top_position"][row, group] >= 0]
        assert [part[0] for part in heat["parts"]] == [f"token {token} " for token in known]
    other = tiny.save(tmp_path / "other", layers=1)
    fast = tiny.tokenizer(vocab=300)
    fast.save_pretrained(other)
    (moved / "config.yaml").write_text(config.replace(run.recipe.model.path, str(other)))
    heats = entries(parsed(write_report(moved))[2], "trim", "heat")
    assert any(part[0].startswith("token ") for (heat,) in heats for part in heat["parts"])


def test_what_methods_tell_of_themselves(run):
    _, _, data = parsed(run.folder / "report.html")
    report = lambda method: next(v["report"] for v in data["views"] if v["method"] == method)  # noqa: E731
    told = {m: Selection.load(run.folder / "selections" / m / "seed-0").provenance["report"] for m in ("auto", "quad", "kmq")}
    assert report("auto")["folds"] == told["auto"]["folds"]
    assert report("quad")["trace"] == told["quad"]["trace"]
    assert sorted(one[0] for one in report("kmq")["sizes"]) == [0, 1, 2, 3]
    assert {i: (rows, budget) for i, rows, budget in report("kmq")["sizes"]} == {
        i: pair for i, pair in enumerate(zip(told["kmq"]["sizes"], told["kmq"]["budgets"], strict=True))
    }


def test_the_same_run_gives_the_same_page_wherever_it_lies(run, tmp_path):
    before = (run.folder / "report.html").read_bytes()
    moved = shutil.copytree(run.folder, tmp_path / "moved")
    assert write_report(moved, tmp_path / "page.html").read_bytes() == before


def test_a_large_pool_stays_a_small_page(tmp_path, tiny_model):
    n = 100_000
    file = write_report(large_run(tmp_path / "large", tiny_model, n))
    text, _, data = parsed(file)
    assert file.stat().st_size < 5_000_000, "the README states this size"
    assert len(data["rows"]["pool"]) == len(set(data["rows"]["pool"])) == 4000 and data["run"]["rows"] == n
    assert sum(data["sources"]["pool"]) == n == sum(data["lengths"]["pool"]) and len(data["sources"]["names"]) == 24
    for view in data["views"]:
        assert view["rows"] == 5000 and view["ranks"][:300] == list(range(300)), "the best rows are all there"
        assert sum(view["sources"]) == 5000 and len(view["rejects"]) == (25 if view["score"] else 0)
    assert "<strong>4,000 rows are on this page" in text
    small = write_report(tmp_path / "large", tmp_path / "small.html", sample=300)
    assert len(parsed(small)[2]["rows"]["pool"]) == 300 and small.stat().st_size < 1_000_000


def test_mistakes_say_what_to_type(run, tmp_path):
    with pytest.raises(UsageError, match=r"not the folder of a run \(no config\.yaml\); give one"):
        write_report(tmp_path)
    with pytest.raises(UsageError, match="give at least 10"):
        write_report(run, sample=3)
    with pytest.raises(UsageError, match="is a folder; give a file"):
        write_report(run, tmp_path)
    bare = shutil.copytree(run.folder, tmp_path / "bare", ignore=shutil.ignore_patterns("selections"))
    with pytest.raises(UsageError, match="no selections to report on; type: llmselect select"):
        write_report(bare)
    with pytest.raises(ValueError, match="not JSON compliant"):
        page.as_json({"loss": float("nan")})


def test_a_run_tells_where_its_report_is_and_outlives_its_failure(run, capsys, monkeypatch):
    cli._closing(run, as_json=False)
    assert capsys.readouterr().out == f"report: {run.folder / 'report.html'}\n"

    def broken(_):
        raise OSError("disk full")

    monkeypatch.setattr("llmselect.report.write_report", broken)
    cli._closing(run, as_json=True)
    told = capsys.readouterr()
    assert told.out == "" and "no report: OSError: disk full" in told.err and f"llmselect report {run.folder}" in told.err
