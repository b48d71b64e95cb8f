"""How selections and stores show themselves: tables for notebooks, figures with matplotlib."""

from __future__ import annotations

import re

import numpy as np
import pytest

from llmselect.engine import progress
from llmselect.errors import LlmselectError, MissingExtra, UsageError
from llmselect.heat import TOPS, token_heat
from llmselect.notebook import Heat, Table
from llmselect.plots import overlap
from llmselect.selection import Selection
from llmselect.store import FeatureStore

SCRIPT = "<script>alert(1)</script>"


@pytest.fixture
def selection() -> Selection:
    """30 of 100 rows, the best first, with ids, scores and evidence that should break a page."""
    scores = np.linspace(0, 1, 100)
    evidence = {f"why {SCRIPT}": np.array([SCRIPT] * 30), "deep": np.zeros((30, 2))}
    about = {"selector": SCRIPT, "method": "m & n", "seed": 0}
    return Selection(np.arange(99, 69, -1), 100, scores, evidence=evidence, provenance=about, ids=["<b>"] * 30)


def tags(html: str) -> set[str]:
    return {name.lower() for name in re.findall(r"<\s*([a-zA-Z!][\w-]*)", html)}


def test_a_selection_shows_itself_escaped_and_small(selection):
    html = selection._repr_html_()
    assert tags(html) == {"div", "p", "b", "table", "thead", "tbody", "tr", "th", "td"}
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html and "m &amp; n" in html and "&lt;b&gt;" in html
    assert "30 of 100" in html and "… and 22 more" in html and html.count("<tr>") == 9 and len(html) < 5000
    assert re.findall(r"<td>(\d+)</td><td>(\d+)</td>", html)[0] == ("1", "99"), "rank and row"
    assert "deep" not in html and "http" not in html
    assert "0 of 3" in Selection(np.zeros(0, np.int64), 3)._repr_html_()


def test_a_store_shows_its_features_and_what_is_missing(tmp_path):
    store = FeatureStore(tmp_path / "<i>")
    assert "features: <b>0</b>" in store._repr_html_()
    made = store.create("emb", {"arrays": {"value": ["float16", [4]]}, "extractor": SCRIPT, "shard_rows": 2}, ["a", "b", "c"])
    made.write(0, {"value": np.zeros((2, 4), np.float16)})
    html = store._repr_html_()
    assert "value float16 [3, 4]" in html and "1 of 2 shards missing" in html and SCRIPT not in html and "i" not in tags(html)
    made.write(1, {"value": np.zeros((1, 4), np.float16)})
    assert "complete" in store._repr_html_()


def test_figures_show_shares_before_and_after(selection):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = ["a"] * 60 + ["b"] * 20 + ["$c$"] * 20
    ax = selection.plot.sources(names)
    widths = [bar.get_width() for bar in ax.patches]
    assert widths == pytest.approx([0.6, 0.2, 0.2, 0, 10 / 30, 20 / 30]), "rows 70 to 99: ten of b, twenty of $c$"
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "b", r"\$c\$"]
    drawn = selection.plot.scores()
    heights = np.array([bar.get_height() for bar in drawn.patches]).reshape(2, -1)
    np.testing.assert_allclose(heights.sum(1), 1)
    assert heights[1][: len(heights[1]) // 2].sum() == 0, "the selected rows have the best scores"
    _, own = pyplot.subplots()
    assert selection.plot.lengths(np.arange(1, 101), ax=own) is own
    own.figure.savefig(__import__("io").BytesIO())
    pyplot.close("all")


def test_figures_refuse_the_wrong_data(selection, monkeypatch):
    with pytest.raises(UsageError, match="pool: 3 rows given; this selection is from a pool of 100"):
        selection.plot.sources(["a", "b", "c"])
    with pytest.raises(UsageError, match="has no scores to plot; methods that rank rows have"):
        Selection(np.arange(3), 9).plot.scores()
    import importlib

    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(MissingExtra, match=r"llmselect\[report\]"):
        selection.plot.scores()


def test_a_table_is_escaped_cut_and_aligned_by_kind():
    shown = Table({f"name {SCRIPT}": [SCRIPT, "x" * 100], "n": np.array([1, 22])}, characters=30)
    html = shown._repr_html_()
    assert tags(html) == {"div", "table", "thead", "tbody", "tr", "th", "td"} and "&lt;script&gt;" in html
    assert f"<td style='text-align:left'>{'x' * 29}…</td><td>22</td>" in html and "<th>n</th>" in html, "numbers to the right"
    assert repr(Table({"a": ["one\ntwo", "b"], "n": [1, 2.34567]})).splitlines() == ["a        n", "one two  1", "b        2.346"]
    with pytest.raises(UsageError, match="'a': 2, 'n': 1"):
        Table({"a": [1, 2], "n": [1]})


def test_a_selection_shows_its_rows_in_rank_order():
    datasets = pytest.importorskip("datasets")
    chats = [[{"role": "user", "content": f"ask {i}"}, {"role": "assistant", "content": f"say {i} {SCRIPT}"}] for i in range(9)]
    pool = datasets.Dataset.from_dict({"id": list("abcdefghi"), "messages": chats, "source": [f"s{i % 2}" for i in range(9)]})
    scores, evidence = np.arange(9) / 4, {"nearest": np.array([7, 8, 9]), "wide": np.zeros((3, 2))}
    made = Selection([8, 3, 5], 9, scores, np.array([3, 2, 1]), evidence, ids=["i", "d", "f"])
    shown = made.show(pool, rows=2, start=1)
    assert dict(shown.columns) == {
        "rank": [2, 3], "source": ["s1", "s1"], "prompt": ["ask 3", "ask 5"], "answer": [f"say 3 {SCRIPT}", f"say 5 {SCRIPT}"],
        "score": [0.75, 1.25], "weight": [2, 1], "nearest": [8, 9],
    }  # fmt: skip
    assert "script" not in tags(shown._repr_html_()) and len(made.show(pool, rows=9).columns["rank"]) == 3
    with pytest.raises(LlmselectError, match="not those selected"):
        made.show(datasets.concatenate_datasets([pool.select([1, 0]), pool.select(range(2, 9))]).select(range(8, -1, -1)))


def test_overlaps_are_drawn_as_the_naive_count_says(selection):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn = {"a": selection, "$b$": Selection(np.arange(60, 90), 100), "c": Selection(np.arange(10), 100)}
    ax = overlap(drawn)
    sets = [set(one.indices.tolist()) for one in drawn.values()]
    assert [text.get_text() for text in ax.texts] == [f"{len(a & b) / len(a | b):.2f}" for a in sets for b in sets]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", r"\$b\$", "c"]
    ax.figure.savefig(__import__("io").BytesIO())
    pyplot.close("all")
    with pytest.raises(UsageError, match="pools of 100 and 3 rows"):
        overlap({"a": selection, "b": Selection([0], 3)})


def test_progress_in_a_notebook_is_one_output_written_anew(monkeypatch):
    shown, now = [], [0.0]

    class Handle:
        def update(self, data, raw):
            shown.append(data)

    monkeypatch.setattr(progress, "_display", lambda data: shown.append(data) or Handle())
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setitem(progress.sys.modules, "ipykernel", progress)
    assert progress.Progress("", 1).bar is None, "a library may have imported it in a process that is no notebook"
    monkeypatch.setattr(progress, "_in_a_notebook", lambda: True)
    one = progress.Progress(f"<b>{SCRIPT}", 1000)
    for _ in range(1000):
        now[0] += 0.01
        one.step(1, 2)
    drawn = len(shown)
    one.close()
    assert 38 <= drawn <= 42, "ten seconds at four a second, and the first"
    values = [float(re.search(r"value='([\d.]+)'", data["text/html"])[1]) for data in shown[:drawn]]
    assert values == sorted(values) and values[0] == 0 and np.diff(values).max() < 0.03 and values[-1] > 0.97
    assert "49%, 5 s left" in shown[1 + values[1:].index(0.486)]["text/html"], "10 ms a step: 514 are left"
    assert shown[-1]["text/plain"] == f"<b>{SCRIPT}: 2,000 in 10 s" and tags(shown[-1]["text/html"]) == {"small"}
    assert all(SCRIPT not in data["text/html"] for data in shown)


def test_marked_text_is_escaped_and_shaded_by_score():
    heat = Heat([[["a <b>", None], [SCRIPT, 0.5], ["z", -1.0]], [["two", 2.0]]])
    html = heat._repr_html_()
    assert tags(html) == {"div", "p", "mark"} and "a &lt;b&gt;<mark" in html
    assert re.findall(r"rgba\(255,150,0,([\d.]+)\).*?title='([-\d.]+)'", html) == [
        ("0.35", "0.500"),
        ("0.00", "-1.000"),
        ("0.70", "2.000"),
    ]
    assert repr(heat) == f"a <b>[{SCRIPT}]0.50[z]-1.00\n[two]2.00"


def test_token_heat_refuses_what_holds_no_tokens(tmp_path):
    store, pool = FeatureStore(tmp_path), [{"messages": []}] * 2
    store.create("emb", {"arrays": {"value": ["float16", [4]]}, "extractor": "embedding", "shard_rows": 2}, ["a", "b"])
    with pytest.raises(UsageError, match="'emb' keeps no tokens of its rows; a feature of the extractor trim does"):
        token_heat(store, "emb", pool, [0], "nowhere")
    tops = {"arrays": {name: ["int32", [1, 4]] for name in TOPS}, "extractor": "trim", "shard_rows": 2}
    store.create("trim", tops, ["a", "b", "c"])
    with pytest.raises(UsageError, match="pool: 2 rows given; 'trim' is of 3"):
        token_heat(store, "trim", pool, [0], "nowhere")
