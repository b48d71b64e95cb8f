"""The three notebooks, run in one kernel: what they compute against naive counts, and what a reader sees."""

from __future__ import annotations

import ast
import gzip
import json
import re
import shutil
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
pytestmark = pytest.mark.timeout(600)  # the first test waits for all three notebooks; busy machines exist

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "recipes/notebooks"
NAMES = ("explore-a-pool", "compare-selectors", "explain-a-selection")
PROBES = {
    "explore-a-pool": "dict(rows=len(pool), sources=sources, order=order, nearest=nearest, share=share.tolist(), "
    "loss={n: float(loss[source == n].mean()) for n in order}, place=(place**2).sum(0).tolist())",
    "compare-selectors": "dict(picked={n: s.indices.tolist() for n, s in selections.items()}, tokens=tokens.tolist(), "
    "small=small.indices.tolist(), between=float(np.mean(between)), "
    "shown=[t.get_text() for t in plots.overlap(selections).texts])",
    "explain-a-selection": "dict(rds=rds.indices.tolist(), query=rds.evidence['query'].tolist(), asked=asked, "
    "trim=trim.indices.tolist(), scores=trim.scores.tolist(), left=[int(i) for i in left], heat=heat.texts, "
    "loaded=loaded.overlap(rds), loss={n: float(loss[source == n].mean()) for n in names})",
}


def stored(name: str):
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Cells and probed values of each notebook. One kernel, its names cleared between: imports are most of the time."""
    place = tmp_path_factory.mktemp("recipes")
    (place / "quickstart").symlink_to(ROOT / "recipes/quickstart")
    (place / "notebooks").mkdir()
    whole, parts = nbformat.v4.new_notebook(), {}
    for name in NAMES:
        probe = nbformat.v4.new_code_cell(f"import json; plt.close('all'); print(json.dumps({PROBES[name]})); plt.close('all')")
        parts[name] = [*stored(name).cells, probe]
        whole.cells += [*parts[name], nbformat.v4.new_code_cell("%reset -f")]
    for i, cell in enumerate(whole.cells):
        cell["id"] = f"cell-{i}"
    client = nbclient.NotebookClient(whole, timeout=240, resources={"metadata": {"path": str(place / "notebooks")}})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IPYTHONDIR", str(place / "ipython"))
        patch.setenv("PYTHONPATH", str(ROOT), prepend=":")
        client.execute()
    yield {name: (cells[:-1], json.loads(cells[-1].outputs[0].text)) for name, cells in parts.items()}
    shutil.rmtree(place)


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    """The rows that the notebooks read: the first 300 of distinct messages."""
    found = {}
    with gzip.open(ROOT / "recipes/quickstart/assets/pool.jsonl.gz", "rt", encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            found.setdefault(json.dumps(row["messages"]), row)
            if len(found) == 300:
                return list(found.values())
    raise AssertionError("the pool has fewer rows")


def outputs(cells, kind="text/html") -> list[str]:
    shown = [out.data for cell in cells if cell.cell_type == "code" for out in cell.outputs if "data" in out]
    return [data[kind] for data in shown if kind in data]


def count(rows, indices, source) -> int:
    return sum(rows[i]["source"] == source for i in indices)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_stored_is_clean_and_imports_what_is_declared(name):
    notebook = stored(name)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count is None and cell.outputs == [] for cell in code) and len(code) >= 6
    assert not re.search(r"/(home|root|tmp|work|Users)/", (FOLDER / f"{name}.ipynb").read_text("utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    declared = {re.split(r"[<>=\[]", one)[0] for one in project["dependencies"] + project["optional-dependencies"]["notebook"]}
    trees = [ast.walk(ast.parse(cell.source)) for cell in code]
    names = [one for tree in trees for one in tree if isinstance(one, ast.Import | ast.ImportFrom)]
    modules = {m for one in names for m in ([one.module] if isinstance(one, ast.ImportFrom) else [a.name for a in one.names])}
    assert {m.split(".")[0] for m in modules} <= declared | {"llmselect"} | set(sys.stdlib_module_names)


@pytest.mark.parametrize("name", NAMES)
def test_a_reader_sees_tables_figures_and_nothing_else(ran, name):
    cells, _ = ran[name]
    every = [out for cell in cells if cell.cell_type == "code" for out in cell.outputs]
    assert [out for out in every if out.output_type == "error" or out.get("name") == "stderr"] == []
    assert not re.search(r"/(home|root|tmp|work|Users)/", "".join(outputs(cells) + outputs(cells, "text/plain")))
    assert len(outputs(cells, "image/png")) >= 1 and len([html for html in outputs(cells) if "<table>" in html]) >= 3


def test_progress_is_one_line_per_pass_and_done_work_none(ran):
    lines = {name: [text for text in outputs(ran[name][0]) if text.startswith("<small>")] for name in NAMES}
    first = lines["explore-a-pool"]
    assert len(first) == 2 and re.fullmatch(r"<small>tokens, loss, rds: pool rows: 300 in .+</small>", first[1])
    second = [re.match(r"<small>(.*?): pool rows: 300 in", line) for line in lines["compare-selectors"]]
    assert [found[1] for found in second if found] == ["tokens, rds, trim, ngram"] and len(second) == 2
    assert lines["explain-a-selection"] == [], "the others have computed all of it"


def test_exploring_counts_and_orders_rightly(ran, rows):
    cells, found = ran["explore-a-pool"]
    assert found["sources"] == {s: count(rows, range(300), s) for s in {row["source"] for row in rows}} and found["rows"] == 300
    table = next(html for html in outputs(cells) if "loss, mean" in html)
    assert re.findall(r"left'>(\w+)</td><td>\d+</td>", table) == found["order"] == sorted(found["loss"], key=found["loss"].get)
    assert found["loss"]["noisy_math"] > found["loss"]["convert"], "scrambled answers surprise"
    assert found["nearest"][0] == "convert", "the target's own source is nearest to it"
    assert sum(found["share"]) == pytest.approx(1, abs=1e-4)
    assert np.divide(*found["place"]) == pytest.approx(found["share"][0] / found["share"][1], rel=1e-3), "the map's two axes"


def test_comparing_tells_the_shares_and_overlaps_of_the_selections(ran, rows):
    cells, found = ran["compare-selectors"]
    picked = found["picked"]
    assert {len(one) for one in picked.values()} == {30}
    pool, of = count(rows, range(300), "convert") / 300, {name: count(rows, one, "convert") / 30 for name, one in picked.items()}
    assert min(of["trim"], of["rds+"]) > 5 * pool > 3 * of["random"], "the target's own source is over-represented"
    table = next(html for html in outputs(cells) if "(the pool)" in html)
    for name, indices in picked.items():
        tokens, share = sum(found["tokens"][i] for i in indices), f"{of[name]:.0%}"
        assert f"left'>{name}</td><td>30</td><td>{tokens}</td><td style='text-align:left'>{share}</td>" in table
    sets = [set(one) for one in picked.values()]
    assert found["shown"] == [f"{len(a & b) / len(a | b):.2f}" for a in sets for b in sets]
    assert found["small"] == picked["rds+"][:10] and 0 < found["between"] < 0.12


def test_explaining_names_the_example_the_tokens_and_the_losers(ran, rows):
    cells, found = ran["explain-a-selection"]
    with gzip.open(ROOT / "recipes/quickstart/assets/targets/convert/dev.jsonl.gz", "rt", encoding="utf-8") as file:
        questions = [json.loads(line)["messages"][0]["content"] for line in file]
    assert found["asked"] == [questions[q] for q in found["query"][:6]] and found["query"][:12] == list(range(12)), "turns"
    best = sorted(range(300), key=lambda i: -found["scores"][i])
    assert set(found["trim"]) == set(best[:30]) and found["left"] == best[30:]
    for marked, row in zip(found["heat"], found["trim"], strict=False):
        answer, text = rows[row]["messages"][-1]["content"], "".join(piece for piece, _ in marked)
        assert all(piece.strip() in answer for piece, score in marked if score is not None), "only answers are scored"
        assert 1 <= sum(score is not None for _, score in marked) <= 4 and answer[-30:] in text
    table = next(html for html in outputs(cells) if "picked by trim" in html)
    for name in ("convert", "word_math", "noisy_math"):
        numbers = [count(rows, one, name) for one in (range(300), found["rds"], found["trim"])]
        assert f"left'>{name}</td>" + "".join(f"<td>{n}</td>" for n in numbers) in table
    assert found["loss"]["noisy_math"] > max(found["loss"]["convert"], found["loss"]["word_math"]) and found["loaded"] == 1
