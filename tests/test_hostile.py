"""Hostile files, rows, settings, templates and models: told in one message or set aside, never a traceback, never a guess."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import hostile
import hostile_inputs
import tiny
from llmselect.errors import LlmselectError, UsageError
from llmselect.formats import Invalid
from llmselect.pool import read_pool
from llmselect.readers import _object, parse, read_file

SHARES = {"recipes": 0.15, "grids": 0.15}  # they ask TRL about the settings of a training


@pytest.mark.parametrize("group", hostile_inputs.GROUPS)
def test_bad_input_is_told_or_set_aside(group, tmp_path):
    tried = list(hostile_inputs.GROUPS[group](tmp_path, SHARES.get(group, 0.2)))
    assert len(tried) >= 12 and [one for one in tried if one[1]] == []


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("group", hostile_inputs.GROUPS)
def test_all_bad_input_is_told_or_set_aside(group, tmp_path):
    tried = list(hostile_inputs.GROUPS[group](tmp_path, 5.0))
    assert [one for one in tried if one[1]] == []


def test_an_attempt_notices_what_it_is_for():
    def fails(error):
        raise error

    assert hostile_inputs.problem(lambda: fails(KeyError("x"))) == "KeyError: 'x'"
    assert hostile_inputs.problem(lambda: fails(LlmselectError("x")), UsageError) == "LlmselectError: x"
    assert "says" in hostile_inputs.problem(lambda: fails(UsageError("x" * 9999)))
    assert "says" in hostile_inputs.problem(lambda: fails(UsageError("x")), said="y")
    assert hostile_inputs.problem(lambda: None, must=True) == "nothing was said"
    assert hostile_inputs.problem(lambda: fails(UsageError("an x")), must=True, said="x") == ""


PLAIN = st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x))


@given(PLAIN)
def test_any_line_of_json_is_the_value_that_json_says(value):
    assert parse(json.dumps(value).encode()) == value
    assert parse(json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")) in (value, *_surrogates(value))


def _surrogates(value) -> list:
    """What may stand for a value with half of a surrogate pair in it: nothing but the refusal."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
        return []
    except UnicodeEncodeError:
        return [Refused()]


class Refused:
    def __eq__(self, other):
        return isinstance(other, Invalid) and other.reason == "invalid_utf8"


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers())))
def test_an_object_with_a_field_twice_is_no_object(pairs):
    names = [name for name, _ in pairs]
    if len(set(names)) == len(names):
        assert _object(pairs) == dict(pairs)
    else:
        with pytest.raises(Invalid, match="stands twice") as error:
            _object(pairs)
        assert error.value.reason == "duplicate_key"


CELLS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(st.lists(st.tuples(CELLS, CELLS), min_size=1), st.sampled_from(["\n", "\r\n"]), st.booleans())
def test_a_table_is_read_back_as_it_was_written(tmp_path, rows, end, marked):
    import csv
    import io

    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator=end, quoting=csv.QUOTE_ALL)  # else a lone CR stays bare
    writer.writerows([("prompt", "completion"), *rows])
    (tmp_path / "a.csv").write_bytes(text.getvalue().encode("utf-8-sig" if marked else "utf-8"))
    found = [row for _, row in read_file(tmp_path / "a.csv", 1_000_000)]
    assert found == [{"prompt": a, "completion": b} for a, b in rows]


BOMB = """
import resource, sys
from pathlib import Path
from llmselect import readers
from llmselect.errors import LlmselectError
import csv, gzip, json
most = 400 << 20
resource.setrlimit(resource.RLIMIT_AS, (most, most))
try:
    found = list(readers.read_file(Path(sys.argv[1]), 1_000_000))
    print([row.reason if hasattr(row, "reason") else "row" for _, row in found])
except LlmselectError as error:
    print("told:", error)
"""


@pytest.mark.parametrize(
    ("name", "head", "said"),
    [
        ("a.jsonl.gz", b"", "['too_large', 'row']"),
        ("a.csv.gz", b"prompt,completion\n", "['invalid_csv', 'row']"),
        ("a.json.gz", b"[", "told: {path}: a .json file is read as a whole and this one does not fit; make it .jsonl"),
    ],
)
def test_a_gzip_bomb_is_refused_in_little_memory(tmp_path, name, head, said):
    """512 MB in half a megabyte, under an address space of 400 MB."""
    zeros = gzip.compress(b"x" * (8 << 20), mtime=0)
    tail = b"\n" + (b"q,a\n" if "csv" in name else hostile.GOOD)
    (tmp_path / name).write_bytes(gzip.compress(head) + zeros * 64 + gzip.compress(tail))
    assert (tmp_path / name).stat().st_size < 1 << 20
    done = subprocess.run([sys.executable, "-c", BOMB, str(tmp_path / name)], capture_output=True, text=True)
    assert done.stdout.startswith(said.format(path=tmp_path / name)), done.stdout + done.stderr


def test_a_json_file_beyond_its_limit_is_not_parsed(tmp_path, monkeypatch):
    from llmselect import readers

    (tmp_path / "a.json").write_bytes(b"[" + hostile.GOOD + b"]")
    size = len(hostile.GOOD) + 2
    monkeypatch.setattr(readers, "MOST_JSON", size)
    assert len(list(read_file(tmp_path / "a.json", 1000))) == 1
    monkeypatch.setattr(readers, "MOST_JSON", size - 1)
    with pytest.raises(LlmselectError, match=r"make it \.jsonl"):
        list(read_file(tmp_path / "a.json", 1000))


def test_names_of_files_may_be_any_bytes(tmp_path):
    name = b"pool\xff.jsonl".decode("utf-8", "surrogateescape")
    (tmp_path / name).write_bytes(b"{\n" + hostile.GOOD)
    pool, report = read_pool(str(tmp_path), workdir=tmp_path / "work", max_invalid=1.0)
    assert pool["source"][:] == ["pool\\udcff"] and (report.kept, report.invalid) == (1, 1)
    entry = json.loads((tmp_path / "work" / "quarantine.jsonl").read_text("utf-8"))
    assert entry["origin"] == "pool\\udcff.jsonl:1" and entry["reason"] == "invalid_json"


def test_a_quote_that_is_never_closed_costs_what_it_swallowed_and_no_more(tmp_path):
    lines = [f"q{i},a{i}" for i in range(400)]
    lines[3] = '"open,a'
    (tmp_path / "a.csv").write_text("prompt,completion\n" + "\n".join(lines) + "\n")
    _, report = read_pool(str(tmp_path / "a.csv"), workdir=tmp_path, max_invalid=1.0, max_row_bytes=500)
    assert report.reasons == {"invalid_csv": 1} and 300 < report.kept < 399


def test_a_conversation_that_the_template_refuses_is_set_aside_alone(tmp_path):
    from llmselect.prepare import prepare
    from llmselect.recipe import load_recipe
    from llmselect.stages import Run

    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + tiny.CHATML
    model = tiny.save(tmp_path / "model", template=refusing, layers=1)
    chats = tiny.chats(30)
    systems = sum(chat[0]["role"] == "system" for chat in chats)
    for name, rows in (("pool", chats), ("dev", [chats[0]])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in rows))
    plan = {"name": "refusing", "out": str(tmp_path / "run"), "model": {"path": str(model), "max_length": 256},
            "pool": {"path": str(tmp_path / "pool.jsonl"), "decontaminate": False},
            "targets": {"t": {"dev": str(tmp_path / "dev.jsonl")}}, "methods": {"random": {"selector": "random"}}}  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(json.dumps(plan))
    run = Run(load_recipe(tmp_path / "recipe.yaml"))
    prepare(run)
    account = json.loads((run.folder / "rows.json").read_text())
    assert systems and account["unusable"] == {"template_refuses": systems} and len(run.pool) == 30 - systems
    entries = [json.loads(line) for line in (run.folder / "quarantine.jsonl").read_text().splitlines()]
    assert all("no system turn" in one["detail"] for one in entries) and len(entries) == systems


def test_nobody_is_asked_whether_a_models_code_may_run(tmp_path, monkeypatch):
    from llmselect.engine.backbone import Backbone

    folder = dict(hostile.broken_models(tmp_path))["remote code"]
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="custom code"):
        Backbone(str(folder))
    assert not list(Path(tmp_path).rglob("OWNED"))
