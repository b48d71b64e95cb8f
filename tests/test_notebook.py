"""How selections and stores show themselves: tables for notebooks, figures with matplotlib."""

from __future__ import annotations

import re

import numpy as np
import pytest

from llmselect.errors import MissingExtra, UsageError
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
