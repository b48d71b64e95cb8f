"""Pools: every format, every kind of bad row, duplicates, decontamination, and the account of all rows."""

from __future__ import annotations

import gzip
import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmselect.decontaminate import NGRAM, Contamination, words
from llmselect.errors import LlmselectError, UsageError
from llmselect.formats import Invalid, to_messages
from llmselect.pool import content_id, load_pool, read_pool

GOOD = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
ARABIC = {"messages": [{"role": "user", "content": "مرحبا 👩‍👩‍👧 \u202eabc"}, {"role": "assistant", "content": "أهلا 🎉"}]}


def say(*turns):
    return {"messages": [{"role": r, "content": c} for r, c in turns]}


def line(row) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode()


# The kinds of bad rows of the promise, each with the reason it must be given. A row of only special tokens and one
# longer than the context need a tokenizer: `test_rows_that_a_tokenizer_refuses` in test_stages.
BAD = [
    (b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}', "invalid_utf8"),
    (b'{"messages": [{"role": "user"', "invalid_json"),
    (b"[1, 2]", "not_an_object"),
    (line({"messages": []}), "empty_messages"),
    (line(say(("user", "only a question"))), "no_assistant_turn"),
    (line(say(("user", "a"), ("assistant", "b"), ("user", "c"))), "last_turn_not_assistant"),
    (line(say(("user", "a"), ("wizard", "b"))), "unknown_role"),
    (line(say(("user", "a"), ("assistant", None))), "null_content"),
    (line(say(("user", "a"), ("assistant", "  "))), "empty_response"),
    (line(say(("user", "a"), ("assistant", "x" * 10_000_000))), "too_large"),
    (line({"messages": [{"role": "user", "content": {"nested": ["wrong"]}}]}), "wrong_type"),
    (line({"messages": "not a list"}), "wrong_type"),
    (line({"messages": ["turn"]}), "wrong_type"),
    (line(say(("user", "a\0b"), ("assistant", "c"))), "nul_byte"),
    (b'{"messages": [{"role": "user", "content": "\\ud800"}, {"role": "assistant", "content": "b"}]}', "invalid_utf8"),
    (line({"something": "else"}), "unknown_format"),
]


def test_every_bad_row_is_quarantined_with_its_reason_and_the_good_ones_kept(tmp_path):
    parts, expected = [], []
    for i, (bad, reason) in enumerate(BAD):
        parts += [bad, line(say(("user", f"q{i}"), ("assistant", f"a{i}")))]
        expected.append((f"pool.jsonl:{2 * i + 1}", reason))
    parts += [line(ARABIC), line(GOOD), line(GOOD)]
    (tmp_path / "pool.jsonl").write_bytes(b"\n".join(parts))
    data, report = read_pool(tmp_path / "pool.jsonl", max_invalid=1.0, workdir=tmp_path / "work")
    entries = [json.loads(x) for x in (tmp_path / "work" / "quarantine.jsonl").read_text("utf-8").splitlines()]
    assert [(e["origin"], e["reason"]) for e in entries if e["kind"] == "invalid"] == expected
    assert [e["origin"] for e in entries if e["kind"] == "duplicate"] == [f"pool.jsonl:{len(parts)}"]
    assert [m[-1]["content"] for m in data["messages"]] == [f"a{i}" for i in range(len(BAD))] + ["أهلا 🎉", "hello"]
    assert data[len(BAD)]["messages"] == ARABIC["messages"]
    assert (report.read, report.kept, report.invalid, report.duplicates) == (len(parts), len(BAD) + 2, len(BAD), 1)
    assert report.read == report.kept + report.invalid + report.duplicates + report.contaminated


def test_a_mostly_bad_file_stops_with_examples_and_keeps_the_quarantine(tmp_path):
    (tmp_path / "p.jsonl").write_bytes(b"\n".join([line(GOOD)] * 3 + [b"{"] * 5))
    with pytest.raises(LlmselectError, match="5 of 8 rows are invalid") as error:
        load_pool(tmp_path / "p.jsonl", workdir=tmp_path / "w")
    text = str(error.value)
    assert "p.jsonl:4: invalid_json" in text and "pool.max_invalid" in text and text.count("invalid_json:") == 3
    assert len((tmp_path / "w" / "quarantine.jsonl").read_text().splitlines()) == 5 + 2


@pytest.mark.parametrize(("bad", "stops"), [(1, False), (2, True)])
def test_the_default_threshold_is_one_in_a_thousand(tmp_path, bad, stops):
    rows = [line(say(("user", str(i)), ("assistant", "a"))) for i in range(1000 - bad)] + [b"{"] * bad
    (tmp_path / "p.jsonl").write_bytes(b"\n".join(rows))
    if stops:
        with pytest.raises(LlmselectError, match="max_invalid"):
            load_pool(tmp_path / "p.jsonl", workdir=tmp_path / "w")
    else:
        assert len(load_pool(tmp_path / "p.jsonl", workdir=tmp_path / "w")) == 999


QA = say(("user", "2+2?"), ("assistant", "4"))["messages"]
FORMATS = [
    ({"messages": QA}, QA),
    ({"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]}, QA),
    ({"instruction": "2+2?", "input": "", "output": "4"}, QA),
    ({"instruction": "Add.", "input": "2+2", "output": "4"}, say(("user", "Add.\n\n2+2"), ("assistant", "4"))["messages"]),
    ({"prompt": "2+2?", "completion": "4"}, QA),
    ({"prompt": [QA[0]], "completion": [QA[1]]}, QA),
    ({"text": "plain"}, say(("assistant", "plain"))["messages"]),
    ({"system": "Be brief.", "prompt": "2+2?", "completion": "4"}, [{"role": "system", "content": "Be brief."}, *QA]),
]


@pytest.mark.parametrize(("row", "expected"), FORMATS)
def test_formats(row, expected):
    assert to_messages(row) == expected


def test_a_column_map_names_what_is_not_known(tmp_path):
    (tmp_path / "a.csv").write_text('question,reply,origin\n"2+2?",4,quiz\n')
    data = load_pool(
        tmp_path / "a.csv", columns={"prompt": "question", "response": "reply", "source": "origin"}, workdir=tmp_path
    )
    assert data[0] == {"id": content_id(QA), "messages": QA, "source": "quiz"}
    with pytest.raises(UsageError, match="Did you mean 'prompt'"):
        load_pool(tmp_path / "a.csv", columns={"promt": "question"})


def test_the_same_rows_from_every_kind_of_file(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Dataset

    rows = [{"prompt": f"q{i}", "completion": f"a{i}"} for i in range(5)]
    jsonl = "".join(json.dumps(r) + "\n" for r in rows)
    (tmp_path / "a.jsonl").write_text(jsonl)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(jsonl.encode()))
    (tmp_path / "c.json").write_text(json.dumps(rows))
    (tmp_path / "d.json").write_text(json.dumps({"version": 1, "data": rows}))
    (tmp_path / "e.csv").write_text("prompt,completion\n" + "".join(f"q{i},a{i}\n" for i in range(5)))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "f.parquet")
    sources = [*sorted(tmp_path.iterdir()), rows, Dataset.from_list(rows)]
    ids = [load_pool(s, workdir=tmp_path / "w" / str(i))["id"][:] for i, s in enumerate(sources)]
    assert len(ids[0]) == 5 and all(one == ids[0] for one in ids)
    assert load_pool(tmp_path, workdir=tmp_path / "w" / "all")["source"][:] == ["a"] * 5  # the rest are duplicates


def test_ids_are_content_hashes():
    plain = json.dumps([["user", "2+2?"], ["assistant", "4"]], separators=(",", ":"))
    assert content_id(QA) == hashlib.sha256(plain.encode()).hexdigest()[:32]


@pytest.mark.parametrize(("source", "message"), [("nowhere.jsonl", "no file or folder"), ("./x", "no file or folder")])
def test_a_missing_file_never_goes_to_the_hub(source, message):
    with pytest.raises(UsageError, match=message):
        load_pool(source)


def test_an_unknown_kind_of_file_and_a_truncated_one(tmp_path):
    (tmp_path / "a.xlsx").write_text("x")
    with pytest.raises(UsageError, match="unknown kind of file"):
        load_pool(tmp_path / "a.xlsx")
    whole = gzip.compress(b"\n".join(line(say(("user", str(i)), ("assistant", "a"))) for i in range(500)))
    (tmp_path / "b.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(LlmselectError, match=r"b\.jsonl\.gz: the file is truncated"):
        load_pool(tmp_path / "b.jsonl.gz", workdir=tmp_path)


def test_limit_reads_only_the_first_rows(tmp_path):
    rows = [say(("user", str(i)), ("assistant", "a")) for i in range(10)]
    data, report = read_pool(rows, limit=4, workdir=tmp_path)
    assert report.read == len(data) == 4


def test_evaluation_text_is_dropped_by_prompt_and_by_thirteen_words(tmp_path):
    sentence = " ".join(f"w{i}" for i in range(NGRAM))
    test = load_pool([say(("user", "Is it: TRUE?"), ("assistant", f"Yes, {sentence}."))], group="quiz", workdir=tmp_path / "t")
    rows = [
        say(("user", "is it true"), ("assistant", "no")),
        say(("user", "copy"), ("assistant", f"so {sentence.upper()} so")),
        say(("user", "near"), ("assistant", sentence.replace("w5", "v5"))),
        say(("user", "clean"), ("assistant", "row")),
    ]
    data, report = read_pool(rows, against=[test], workdir=tmp_path / "p")
    assert [m[0]["content"] for m in data["messages"]] == ["near", "clean"] and report.contaminated == 2
    assert "quiz/" in (tmp_path / "p" / "quarantine.jsonl").read_text()


def test_template_text_of_an_evaluation_set_marks_nothing(tmp_path):
    shared = " ".join(f"instruction{i}" for i in range(NGRAM))
    rows = [{"id": str(i), "source": "s", **say(("user", f"{shared} item{i}"), ("assistant", f"a{i}"))} for i in range(20)]
    found = Contamination().add(rows)
    assert found.find(say(("user", f"{shared} something new"), ("assistant", "b"))["messages"]) is None
    assert found.find(rows[3]["messages"]) is not None


@given(st.lists(st.sampled_from("ab"), max_size=40), st.lists(st.sampled_from("ab"), min_size=NGRAM, max_size=30))
def test_thirteen_grams_against_naive_sets(pool, evaluation):
    rows = [{"id": "0", "source": "s", **say(("user", "q"), ("assistant", " ".join(evaluation)))}]
    candidate = say(("assistant", " ".join(pool)))["messages"]
    runs = lambda x: {tuple(x[i : i + NGRAM]) for i in range(len(x) - NGRAM + 1)}  # noqa: E731
    expected = bool(runs(words(candidate)) & runs(words(rows[0]["messages"])))
    assert (Contamination().add(rows).find(candidate) is not None) == expected


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(),
        lambda x: (
            st.lists(x, max_size=4)
            | st.dictionaries(
                st.sampled_from(
                    ["messages", "conversations", "role", "content", "from", "value", "prompt", "completion", "text"]
                ),
                x,
                max_size=4,
            )
        ),
    )
)
def test_any_json_is_messages_or_invalid(value):
    try:
        messages = to_messages(value)
    except Invalid:
        return
    assert messages and all(set(m) == {"role", "content"} and isinstance(m["content"], str) for m in messages)
