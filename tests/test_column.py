"""Numbers and tags of the rows' own files, found again by the rows' messages."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from test_stages import recipe_of

import tiny
from llmselect import extractors as E
from llmselect.errors import LlmselectError, UsageError
from llmselect.prepare import prepare
from llmselect.selection import Selection
from llmselect.stages import Run, extract_stage, select_stage

TAGS = [["math", "code"], ["code"], "law", [], ["art", "art", "math"]]


def stated(folder, chats, **more):
    """The pool's file with a score, and tags, on most rows; a copy of the first row with other ones at the end."""
    lines = [{"messages": c, "score": i / 7, "tags": TAGS[i % 5]} for i, c in enumerate(chats)]
    lines[3]["score"] = None
    del lines[4]["tags"]
    file = folder / "stated.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in [*lines, {**lines[0], "score": 99.0, "tags": ["other"]}]))
    return str(file)


def test_values_are_those_of_the_file(tmp_path):
    chats = tiny.chats(12)
    file = stated(tmp_path, chats)
    found = E.Column(files=(file,), column="score").texts(chats[::-1])["value"][::-1]
    np.testing.assert_allclose(found, [np.nan if i == 3 else i / 7 for i in range(12)], rtol=1e-6)
    one = E.Column(files=(file,), column="tags", kind="tags")
    assert one.tags() == ["art", "code", "law", "math"]
    expected = np.array([[0, 1, 0, 1], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0], [1, 0, 0, 1]])[np.arange(12) % 5]
    expected[4] = 0
    assert np.array_equal(one.texts(chats)["value"].scipy().toarray(), expected)
    some = E.Column(files=(file,), column="tags", kind="tags", least=3)
    assert some.tags() == ["code", "math"] == [t for t, c in zip(one.tags(), expected.sum(0), strict=True) if c >= 3]
    assert np.array_equal(some.texts(chats)["value"].scipy().toarray(), expected[:, [1, 3]])
    assert not E.Column(files=(file,), column="tags", kind="tags").texts(tiny.chats(2, 77))["value"].scipy().toarray().any()


def test_a_recipe_selects_by_the_users_own_columns_and_a_changed_file_is_noticed(tmp_path, tiny_model, caplog):
    chats, dev = tiny.chats(40), tiny.chats(4, 50)
    file, target = stated(tmp_path, chats), tmp_path / "tagged.jsonl"
    target.write_text("".join(json.dumps({"messages": c, "tags": ["law"], "score": 1}) + "\n" for c in dev))
    files = [f"./{Path(one).name}" for one in (file, target)]  # beside the recipe, wherever it is run from
    features = {"score": {"extractor": "column", "files": files, "column": "score"},
                "tags": {"extractor": "column", "files": files, "column": "tags", "kind": "tags"}}  # fmt: skip
    methods = {"best": {"selector": "topk", "x": "score"}, "mass": {"selector": "mass", "x": "tags"},
               "mig": {"selector": "mig", "x": "tags", "quality": "score"}}  # fmt: skip
    run = Run(recipe_of(tmp_path, tiny_model, chats, features=features, methods=methods, budget=6))
    for stage in (prepare, extract_stage, select_stage):
        stage(run)
    assert "score@target.value: 4 rows have no finite value" in caplog.text, "rows of a target are told from those of the pool"
    place = {json.dumps(c): i for i, c in enumerate(chats)}
    plain = lambda row: json.dumps([{"role": m["role"], "content": m["content"]} for m in row])  # noqa: E731
    mine = np.array([place[plain(row)] for row in run.pool["messages"]])
    made = {name: Selection.load(run.folder / "selections" / name / "seed-0").indices for name in methods}
    assert mine[made["best"]].tolist() == sorted(set(mine.tolist()) - {3}, reverse=True)[:6]
    assert {TAGS[i % 5] if i != 4 else "" for i in mine[made["mass"]].tolist()} == {"law"}
    assert 3 not in mine[made["mig"]]
    stated(tmp_path, chats[::-1])
    with pytest.raises(LlmselectError, match="values"):
        extract_stage(run)


@pytest.mark.parametrize(("options", "told"), [
    ({"column": "scor"}, r"no row of .* has a field 'scor'\..*score"),
    ({"column": "tags"}, "not a number"),
    ({"column": "score", "kind": "tags"}, "not a text or a list of texts"),
    ({"column": "tags", "kind": "tags", "least": 100}, "stands in 100 rows"),
    ({"column": "tags", "least": 0}, "least must be"),
])  # fmt: skip
def test_mistakes_are_named(tmp_path, options, told):
    with pytest.raises(UsageError, match=told):
        E.Column(files=(stated(tmp_path, tiny.chats(12)),), **options).arrays(None, [])  # type: ignore[arg-type]
        E.Column(files=(stated(tmp_path, tiny.chats(12)),), **options).settings()
