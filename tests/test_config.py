"""Strict configuration: what goes in comes out, and everything else is refused with the key and what to type."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llmselect import config
from llmselect.errors import LlmselectError, UsageError
from llmselect.strict_yaml import parse_yaml


@dataclass(frozen=True)
class Inner:
    tokens: int = 1000
    rate: float = 1e-4
    mode: Literal["fast", "exact", 3] = "fast"

    def __post_init__(self) -> None:
        if self.tokens < 0:
            raise ValueError(f"tokens must be positive, got {self.tokens}")


@dataclass(frozen=True)
class Outer:
    name: str
    train: Inner = field(default_factory=Inner)
    folder: Path | None = field(default=None, metadata={"help": "where to write"})
    seeds: list[int] = field(default_factory=lambda: [0])
    span: tuple[int, float] = (1, 2.0)
    parts: tuple[str, ...] = ()
    groups: dict[str, Inner] = field(default_factory=dict)
    budget: int | float | str | dict[str, float] = "5%"
    warmup: Inner | None = None
    shuffle: bool = False
    extra: Any = None
    derived: int = field(init=False, default=7)


inner = st.builds(
    Inner,
    tokens=st.integers(0, 10**18),
    rate=st.floats(allow_nan=False, allow_infinity=False),
    mode=st.sampled_from(["fast", "exact", 3]),
)
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(st.text(), inside, max_size=3),
    max_leaves=8,
)
number = st.floats(allow_nan=False, allow_infinity=False)
outer = st.builds(
    Outer,
    name=st.text(),
    train=inner,
    folder=st.none() | st.text("abc/.", min_size=1).map(Path),
    seeds=st.lists(st.integers()),
    span=st.tuples(st.integers(), number),
    parts=st.lists(st.text()).map(tuple),
    groups=st.dictionaries(st.text(), inner, max_size=3),
    budget=st.integers() | number | st.text() | st.just("7") | st.just({"rows": 3.0}),
    warmup=st.none() | inner,
    shuffle=st.booleans(),
    extra=plain,
)


@given(outer)
@example(Outer("1e5", budget="1e5"))
@example(Outer("a", budget=1e5))
def test_round_trip_through_json(made: Outer):
    text = json.dumps(config.to_dict(made), allow_nan=False)
    again = config.from_dict(Outer, json.loads(text))
    assert again == made
    assert type(again.budget) is type(made.budget)
    assert config.fingerprint(again) == config.fingerprint(made)


@given(outer)
@example(Outer("1e5", budget="2E-3", extra=["1e999", "yes", "1:30", "010", "2024-01-01", "<<", "=", "~", "\x85"]))
@example(Outer("a", budget=1e5, extra=[1e-7, 1e16, -0.0, {"no": {"1": None, "1e5": "${x}"}}]))
def test_round_trip_through_yaml(made: Outer):
    text = config.dump_yaml(config.to_dict(made))
    again = config.from_dict(Outer, parse_yaml(text, "made"))
    assert again == made
    assert config.fingerprint(again) == config.fingerprint(made)


def test_dumped_yaml_has_no_aliases_and_keeps_the_order():
    shared = [1, 2]
    data = {"b": shared, "a": {"c": shared}}
    text = config.dump_yaml(data)
    assert "&" not in text
    assert list(parse_yaml(text, "made")) == ["b", "a"]
    assert parse_yaml(text, "made") == data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"name": "a", "train": {"tokns": 1}}, "train.tokns: unknown key. Did you mean 'tokens'? Allowed: tokens"),
        ({"name": "a", "derived": 1}, "derived: unknown key. Allowed: name, train, folder, seeds"),
        ({}, "name: missing; it has no default; expected text"),
        ({"name": 3}, "name: expected text, got 3 (int)"),
        ({"name": "a", "train": {"tokens": "lots"}}, "train.tokens: expected a whole number, got 'lots' (str)"),
        ({"name": "a", "train": {"tokens": "12"}}, "train.tokens: expected a whole number, got '12' (str)"),
        ({"name": "a", "train": {"tokens": True}}, "train.tokens: expected a whole number, got True (bool)"),
        ({"name": "a", "train": {"tokens": 1.5}}, "train.tokens: expected a whole number, got 1.5 (float)"),
        ({"name": "a", "train": {"rate": float("nan")}}, "train.rate: expected a number, got nan (float)"),
        ({"name": "a", "train": {"rate": 10**400}}, "train.rate: expected a number, got 1000"),
        ({"name": "a", "train": {"rate": "1e999"}}, "train.rate: expected a number, got '1e999' (str)"),
        (
            {"name": "a", "train": {"mode": "fats"}},
            "train.mode: expected one of fast, exact, 3, got 'fats' (str). Did you mean 'fast'?",
        ),
        ({"name": "a", "train": {"mode": "3"}}, "train.mode: expected one of fast, exact, 3, got '3' (str)"),
        ({"name": "a", "train": 4}, "train: expected a mapping of keys, got 4 (int)"),
        ({"name": "a", "train": {"tokens": -1}}, "train: tokens must be positive, got -1"),
        ({"name": "a", "groups": {"x": {"tokens": -1}}}, "groups.x: tokens must be positive, got -1"),
        ({"name": "a", "groups": {1: {}}}, "groups: the key 1 is not text; put it in quotes"),
        ({"name": "a", "seeds": 1}, "seeds: expected a list, got 1 (int)"),
        ({"name": "a", "seeds": "12"}, "seeds: expected a list, got '12' (str)"),
        ({"name": "a", "seeds": [0, "x"]}, "seeds[1]: expected a whole number, got 'x' (str)"),
        ({"name": "a", "span": [1]}, "span: expected a list of 2 values, got [1] (list)"),
        (
            {"name": "a", "budget": True},
            "budget: expected a whole number or a number or text or a mapping of keys, got True (bool)",
        ),
        ({"name": "a", "budget": {"rows": "x"}}, "budget.rows: expected a number, got 'x' (str)"),
        ({"name": "a", "folder": 3}, "folder: expected a path or null, got 3 (int)"),
        ({"name": "a", "warmup": {"tokns": 3}}, "warmup.tokns: unknown key. Did you mean 'tokens'?"),
        ({"name": "a", "warmup": 3}, "warmup: expected a mapping of keys or null, got 3 (int)"),
        ({"name": "a", "shuffle": 1}, "shuffle: expected true or false, got 1 (int)"),
        ({"name": "a", "shuffle": "no"}, "shuffle: expected true or false, got 'no' (str)"),
    ],
)
def test_refusals_name_the_key_what_was_given_and_what_is_allowed(data, message):
    with pytest.raises(UsageError) as caught:
        config.from_dict(Outer, data)
    assert str(caught.value).startswith(message)


def test_a_long_value_is_not_said_back():
    with pytest.raises(UsageError, match="expected a list") as told:
        config.from_dict(Outer, {"name": "a", "seeds": "x" * 100_000})
    assert len(str(told.value)) < 300


def test_top_level_must_be_a_mapping():
    with pytest.raises(UsageError, match="recipe: expected a mapping of keys, got \\['name'\\]"):
        config.from_dict(Outer, ["name"])


@given(st.text(min_size=1).filter(lambda key: key not in {f.name for f in dataclasses.fields(Outer)}))
def test_any_other_key_is_refused(key):
    with pytest.raises(UsageError, match=re.escape(f"{key}: unknown key.")):
        config.from_dict(Outer, {"name": "a", key: 1})


@pytest.mark.parametrize(("given_value", "tokens"), [(1e5, 100_000), ("1e5", 100_000), ("2.5E+3", 2500), (7, 7)])
def test_whole_numbers_written_as_floats(given_value, tokens):
    made = config.from_dict(Inner, {"tokens": given_value})
    assert made.tokens == tokens
    assert type(made.tokens) is int


def test_an_integer_in_a_float_field_becomes_a_float():
    assert type(config.from_dict(Inner, {"rate": 1}).rate) is float


@pytest.mark.parametrize("value", [{1, 2}, b"x", float("inf"), object()])
def test_values_that_json_lacks_are_refused(value):
    with pytest.raises(LlmselectError, match="is no plain value"):
        config.to_dict(Outer("a", extra=[value]))


def test_fingerprint_is_the_hash_of_canonical_json():
    text = '{"a":{"b":[1,2.5,null],"c":"\\u00e9"}}'
    assert config.fingerprint({"a": {"c": "é", "b": (1, 2.5, None)}}) == hashlib.sha256(text.encode()).hexdigest()
    assert config.fingerprint({"a": 1}) != config.fingerprint({"a": True})


@given(plain, plain)
def test_difference_is_empty_exactly_when_fingerprints_agree(a, b):
    assert config.difference(a, a) == []
    assert (config.difference(a, b) == []) == (config.fingerprint(a) == config.fingerprint(b))


def test_difference_lines():
    old = {"train": {"tokens": 1000, "mode": "a"}, "gone": None, "seeds": [0]}
    new = {"train": {"tokens": 2000, "mode": "a"}, "new": {"x": 1}, "seeds": [0, 1]}
    assert config.difference(old, new) == [
        "gone: null -> absent",
        'new: absent -> {"x":1}',
        "seeds: [0] -> [0,1]",
        "train.tokens: 1000 -> 2000",
    ]


def test_overrides():
    data = {"train": {"tokens": 5, "rate": 1}, "budget": "7%", "seeds": [3]}
    made = config.apply_overrides(
        data, ["train.tokens=1e5", "train.rate=null", "seeds=[0,1]", "budget=5%", "a.b.c=true", "path=x=y", "empty="]
    )
    assert made == {
        "train": {"tokens": 1e5, "rate": None},
        "seeds": [0, 1],
        "budget": "5%",
        "a": {"b": {"c": True}},
        "path": "x=y",
        "empty": None,
    }
    assert data == {"train": {"tokens": 5, "rate": 1}, "budget": "7%", "seeds": [3]}
    assert config.apply_overrides({"budget": "5%"}, ["budget.rows=10"]) == {"budget": {"rows": 10}}


@pytest.mark.parametrize("text", ["tokens", "=3", "a..b=1", ".a=1", "a.=1", "a b=1", "a[0]=1", ""])
def test_overrides_that_are_none(text):
    with pytest.raises(UsageError, match=re.escape(f"{text!r} is not an override; type key=value")):
        config.apply_overrides({}, [text])


def test_override_inside_a_list_and_bad_values():
    with pytest.raises(UsageError, match=r"seeds is a list; give all of it, for example seeds=\[0,1\]"):
        config.apply_overrides({"seeds": [0]}, ["seeds.0=1"])
    with pytest.raises(UsageError, match=r"override 'a=\[1': line 1, column 3"):
        config.apply_overrides({}, ["a=[1"])
    with pytest.raises(UsageError, match="text with such signs is given as a='\"…\"'"):
        config.apply_overrides({}, ["a=*.jsonl"])
    assert config.apply_overrides({}, ['a="*.jsonl"']) == {"a": "*.jsonl"}


def test_substitute():
    data = {"pool": {"path": "${data}/pool-$data.jsonl"}, "list": ["${n}", 3], "vars": {"data": "${raw}"}}
    assert config.substitute(data, {"data": "/d/${n}", "n": 2}) == {
        "pool": {"path": "/d/${n}/pool-$data.jsonl"},
        "list": ["2", 3],
        "vars": {"data": "${raw}"},
    }


@pytest.mark.parametrize("values", [{}, {"data": None}])
def test_substitute_says_what_to_set_and_never_reads_the_environment(values, monkeypatch):
    monkeypatch.setenv("data", "/secret")
    with pytest.raises(UsageError, match=r"pool\.path: .* needs a value for 'data'; set it: vars\.data=PATH"):
        config.substitute({"pool": {"path": "${data}/x"}}, values)


@pytest.mark.parametrize("text", ["${a-b}", "${}", "${open", "${a b}"])
def test_substitute_refuses_what_is_no_variable(text):
    with pytest.raises(UsageError, match="names no variable"):
        config.substitute({"x": text}, {"a": 1, "open": 2})


def test_fields_help():
    rows = {row["name"]: row for row in config.fields_help(Outer)}
    assert rows["folder"] == {"name": "folder", "type": "a path or null", "default": None, "help": "where to write"}
    assert rows["name"]["default"] == "required"
    assert rows["train.tokens"]["default"] == 1000
    assert rows["train.mode"]["type"] == "one of fast, exact, 3"
    assert rows["seeds"]["default"] == [0]
    assert "derived" not in rows


def test_load_yaml(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("\ufeffa: {b: [1, 2.5, yes, 2e5, -1E-3]}\nday: 2024-01-01\nshare: 5%\nsha: 1e5f\n", "utf-8")
    numbers = [1, 2.5, True, 200_000.0, -0.001]
    assert config.load_yaml(file) == {"a": {"b": numbers}, "day": "2024-01-01", "share": "5%", "sha": "1e5f"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: [1, 2\n", "line 3, column 1"),
        ("a: 1\nb:\n  c: 1\n  c: 2\n", "line 4, column 3: the key 'c' stands here twice"),
        ("a: &x [1]\nb: *x\n", "line 2, column 4: aliases"),
        ("targets:\n  no: 1\n", "line 2, column 3: the key 'no' is not text; put it in quotes"),
        ("? [1]\n: 2\n", "is not text; put it in quotes"),
        ("a: !!python/object/apply:os.system [ls]\n", "line 1, column 4: could not determine a constructor"),
        ("a: !!set {b}\n", "line 1, column 4: could not determine a constructor"),
        ("a: 1\nb: \x07\n", "line 2: the character 7 is not allowed in YAML"),
        ("[" * 50_000, "nested too deeply"),
        ("a: " + "9" * 5000, "4300 digits"),
        ("- a\n", "expected a mapping of keys (lines of key: value); its top level is list"),
        ("", "it is empty"),
        ("---\na: 1\n---\nb: 1\n", "line 3, column 1: but found another document"),
    ],
)
def test_bad_yaml_names_file_and_line(tmp_path, text, message):
    file = tmp_path / "recipe.yaml"
    file.write_text(text, "utf-8")
    with pytest.raises(UsageError) as caught:
        config.load_yaml(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert message in str(caught.value)


def test_yaml_files_that_cannot_be_read(tmp_path):
    (tmp_path / "big.yaml").write_text("#" * 1_000_001)
    (tmp_path / "latin.yaml").write_bytes(b"a: caf\xe9")
    messages = {"none": "No such file", ".": "directory", "big.yaml": "1,000,000 bytes", "latin.yaml": "not UTF-8"}
    for name, message in messages.items():
        with pytest.raises(UsageError, match=message):
            config.load_yaml(tmp_path / name)
