"""Inputs that mean harm or are simply broken, each with what has to become of it: files of rows, recipes, grids, templates.

`python eval/performance/faults.py` counts them; `test_hostile_rows` and `test_hostile_settings` assert each.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import random
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tiny

GOOD = json.dumps({"prompt": "2+2?", "completion": "4"}).encode()
OTHER = json.dumps({"prompt": "3+3?", "completion": "6"}).encode()


def _say(content: Any, role: Any = "assistant") -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": "q"}, {"role": role, "content": content}]}).encode()


def _zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("pool.jsonl", GOOD)
    return buffer.getvalue()


def _parquet(**columns: Any) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


# A bad row stands before a good one: (file name, bytes, reason of the bad row). Other rows of the file must be kept.
ROWS: dict[str, tuple[str, bytes, str]] = {
    "duplicate keys": ("a.jsonl", b'{"prompt":"q","completion":"a","completion":"b"}\n' + GOOD, "duplicate_key"),
    "duplicate keys inside": (
        "a.jsonl", b'{"messages":[{"role":"user","role":"assistant","content":"x"}]}\n' + GOOD, "duplicate_key"),
    "NaN for text": ("a.jsonl", b'{"prompt":"q","completion":NaN}\n' + GOOD, "wrong_type"),
    "Infinity for a turn": ("a.jsonl", b'{"messages":[Infinity]}\n' + GOOD, "wrong_type"),
    "a number of 6,000 digits": ("a.jsonl", b'{"prompt":' + b"9" * 6000 + b"}\n" + GOOD, "invalid_json"),
    "1e999": ("a.jsonl", b'{"prompt":"q","completion":1e999}\n' + GOOD, "wrong_type"),
    "100,000 brackets": ("a.jsonl", b"[" * 100_000 + b"\n" + GOOD, "invalid_json"),
    "900 nested lists": ("a.jsonl", b'{"x":' + b"[" * 900 + b"]" * 900 + b"}\n" + GOOD, "unknown_format"),
    "900 nested objects in content": (
        "a.jsonl", b'{"prompt":' + b'{"a":' * 900 + b"1" + b"}" * 900 + b',"completion":"a"}\n' + GOOD, "wrong_type"),
    "a lone surrogate in content": ("a.jsonl", b'{"prompt":"q","completion":"\\udc80"}\n' + GOOD, "invalid_utf8"),
    "a lone surrogate as role": ("a.jsonl", _say("x", "\ud800") + b"\n" + GOOD, "unknown_role"),
    "a lone surrogate as field": ("a.jsonl", b'{"\\ud800":1}\n' + GOOD, "unknown_format"),
    "a NUL in content": ("a.jsonl", _say("a\0b") + b"\n" + GOOD, "nul_byte"),
    "NUL bytes in the file": ("a.jsonl", b"\0\0\0\n" + GOOD, "invalid_json"),
    "a byte order mark in the middle": (
        "a.jsonl", b"\xef\xbb\xbf" + OTHER + b"\n\xef\xbb\xbf" + GOOD + b"\n" + GOOD, "invalid_json"),
    "two rows on a line": ("a.jsonl", GOOD + GOOD + b"\n" + GOOD, "invalid_json"),
    "lines ended by CR alone": ("a.jsonl", OTHER + b"\r" + OTHER + b"\n" + GOOD, "invalid_json"),
    "overlong UTF-8": ("a.jsonl", b'{"prompt":"\xc0\xaf","completion":"a"}\n' + GOOD, "invalid_utf8"),
    "a row of 3 MB": ("a.jsonl", _say("x" * 3_000_000) + b"\n" + GOOD, "too_large"),
    "a role that is a list": ("a.jsonl", _say("x", ["assistant"]) + b"\n" + GOOD, "unknown_role"),
    "content that is a number": ("a.jsonl", _say(5) + b"\n" + GOOD, "wrong_type"),
    "messages that are an object": ("a.jsonl", b'{"messages":{"0":{"role":"user"}}}\n' + GOOD, "wrong_type"),
    "numbers for rows": ("a.json", b"[1, " + GOOD + b"]", "not_an_object"),
    "a comma outside quotes": ("a.csv", b"prompt,completion\nq,yes, it is\n2+2?,4\n", "extra_fields"),
    "a quote never closed": ("a.csv", b'prompt,completion\n2+2?,4\nq,"open\n', "invalid_csv"),
    "text after a quote": ("a.csv", b'prompt,completion\n"q"x,a\n2+2?,4\n', "invalid_csv"),
    "a field of 3 MB": ("a.csv", b"prompt,completion\n" + b"x" * 3_000_000 + b",a\n2+2?,4\n", "invalid_csv"),
    "a row without its last field": ("a.csv", b"prompt,completion\nq\n2+2?,4\n", "null_content"),
    "bytes that are no text": ("a.csv", b"prompt,completion\n\xff,a\n2+2?,4\n", "invalid_utf8"),
    "null in parquet": ("a.parquet", _parquet(prompt=["q", "2+2?"], completion=[None, "4"]), "null_content"),
    "numbers in parquet": (
        "a.parquet", _parquet(prompt=["q", "2+2?"], messages=[[1], None], completion=["a", "4"]), "wrong_type"),
}  # fmt: skip
# Read as if nothing were wrong.
FINE: dict[str, tuple[str, bytes]] = {
    "a byte order mark": ("a.jsonl", b"\xef\xbb\xbf" + GOOD),
    "a byte order mark in CSV": ("a.csv", b"\xef\xbb\xbfprompt,completion\r\n2+2?,4\r\n"),
    "mixed line ends": ("a.jsonl", b"\r\n\n \r\n" + GOOD + b"\r\n\r\n"),
    "gzip without its suffix": ("a.jsonl", gzip.compress(GOOD)),
    "several gzip members": ("a.jsonl.gz", gzip.compress(GOOD + b"\n") + gzip.compress(GOOD)),
    "a lone surrogate as source": ("a.jsonl", b'{"prompt":"2+2?","completion":"4","source":"\\ud800"}'),
    "a path as source": ("a.jsonl", b'{"prompt":"2+2?","completion":"4","source":"../../etc/passwd"}'),
    "a path as id": ("a.jsonl", b'{"prompt":"2+2?","completion":"4","id":"../../../x"}'),
    "NaN in a field that nobody reads": ("a.jsonl", b'{"prompt":"2+2?","completion":"4","score":NaN}'),
}
# Refused as a whole: (file name, bytes, what the message says).
FILES: dict[str, tuple[str, bytes, str]] = {
    "UTF-16": ("a.jsonl", GOOD.decode().encode("utf-16"), "UTF-16"),
    "UTF-16 CSV": ("a.csv", "prompt,completion\nq,a\n".encode("utf-16-le", "strict").join([b"\xff\xfe", b""]), "UTF-16"),
    "UTF-32": ("a.json", GOOD.decode().encode("utf-32"), "UTF-32"),
    "an empty file": ("a.jsonl", b"", "no usable rows"),
    "an empty CSV": ("a.csv", b"", "no usable rows"),
    "an empty list": ("a.json", b"[]", "no usable rows"),
    "a cut gzip": ("a.jsonl.gz", gzip.compress(GOOD * 1000)[:-20], "truncated"),
    "gzip with a wrong checksum": ("a.jsonl.gz", gzip.compress(GOOD * 50)[:-8] + b"\0" * 8, "truncated"),
    "gzip of nothing but its first bytes": ("a.jsonl.gz", b"\x1f\x8b", "truncated"),
    "gzip that is damaged within": ("a.jsonl.gz", gzip.compress(bytes(range(256)) * 90)[:60] + b"\xff" * 99, "truncated"),
    "a zip": ("a.zip", _zip(), "unknown kind of file"),
    "bzip2": ("a.jsonl.bz2", bz2.compress(GOOD), "unknown kind of file"),
    "a zip called jsonl": ("a.jsonl", _zip(), "no usable rows"),
    "no parquet": ("a.parquet", b"PAR1 and not much PAR1", "not a readable parquet"),
    "a cut parquet": ("a.parquet", _parquet(prompt=["q"] * 99, completion=["a"] * 99)[:-30], "not a readable parquet"),
    "two columns of one name": ("a.csv", b"prompt,prompt,completion\nq,q,a\n", "stands twice"),
    "column names that never end": ("a.csv", b'"prompt\n', "line of column names"),
}


def settings(folder: Path) -> dict[str, Any]:
    """A sound recipe, to be spoilt."""
    for name in ("pool", "dev"):
        (folder / f"{name}.jsonl").write_bytes(GOOD + b"\n")
    return {
        "name": "hostile", "out": str(folder / "run"), "model": {"path": str(folder / "model")},
        "pool": {"path": str(folder / "pool.jsonl")}, "targets": {"t": {"dev": str(folder / "dev.jsonl")}},
        "features": {"emb": {"extractor": "embedding"}}, "methods": {"random": {"selector": "random"}},
    }  # fmt: skip


# What stands in a recipe in place of what should: (key, value).
VALUES: list[Any] = [None, True, -1, 0, 10**400, 1e308, "", " ", "../../x", "/etc/passwd", "a/b", "a\0b", "\x1b[2J", "nan",
                     [], [[]], {}, {"": {}}, {"../x": {}}, {"a": None}, ["a"], "x" * 100_000, "${x}", "é", "base", ".",
                     ".."]  # fmt: skip
PLACES = ["name", "model", "model.path", "model.max_length", "model.dtype", "pool", "pool.path", "pool.limit", "pool.columns",
          "pool.max_invalid", "pool.max_row_bytes", "pool.split", "targets", "targets.t", "targets.t.dev", "targets.t.dev_limit",
          "features", "features.emb", "features.emb.extractor", "features.emb.layer", "features.emb.pooling", "methods",
          "methods.random", "methods.random.selector", "methods.random.budget", "methods.random.limits", "methods.random.groups",
          "methods.random.x", "budget", "seeds", "train", "train.tokens", "train.sft", "train.lora", "train.schedule", "dedup",
          "dedup.x", "dedup.threshold", "warmup", "warmup.budget", "sae", "sae.k", "refine", "refine.x", "color", "shard_rows",
          "batch_tokens", "out", "vars", "full"]  # fmt: skip
TEMPLATES = {
    "raises": "{{ raise_exception('no') }}",
    "divides by zero": "{{ 1 // 0 }}",
    "reads a class": "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "reads globals": "{{ raise_exception.__globals__ }}",
    "reads through a filter": "{{ messages | attr('__class__') }}",
    "reads through format": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "imports": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "includes a file": "{% include '/etc/passwd' %}",
    "extends a file": "{% extends '/etc/passwd' %}",
    "changes its input": "{{ messages.append(1) }}",
    "a range without end": "{% for i in range(10 ** 9) %}x{% endfor %}",
    "recurses": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "fills the memory": "{{ 'x' * 10 ** 13 }}",
    "makes far too much": "{{ 'x' * 10 ** 7 }}",
    "is no template": "{% for %}",
    "never says the messages": "hello",
    "rewrites them": "{% for m in messages %}{{ m['content'] | reverse }}{% endfor %}",
    "an undefined name": "{{ nothing.at.all }}",
    "an unknown filter": "{{ messages | shell }}",
    "gives a number": "{{ messages | length }}",
}


def spoil(plain: dict[str, Any], place: str, value: Any) -> dict[str, Any]:
    """A copy of `plain` with `value` at a dotted place."""
    out = json.loads(json.dumps(plain))
    *path, last = place.split(".")
    inner = out
    for part in path:
        inner = inner.setdefault(part, {})
    inner[last] = value
    return out


def mutants(data: bytes, count: int, seed: int) -> Iterator[bytes]:
    """`data` with bytes changed, parts cut, doubled, exchanged, and signs put in that mean something to parsers."""
    draw = random.Random(f"mutants {seed}")
    signs = [*(bytes([sign]) for sign in b'\0\xff"{}[],:\\\n-'), b"9" * 400, b"NaN", b"null", b"&a *a", b"\xef\xbb\xbf"]
    for _ in range(count):
        out = bytearray(data)
        for _ in range(draw.choice([1, 1, 1, 2, 3, 8])):
            at, to = sorted(draw.randrange(len(out) + 1) for _ in range(2))
            what = draw.randrange(5)
            if what == 0 and at < len(out):
                out[at] ^= 1 << draw.randrange(8)
            elif what == 1:
                del out[at:to]
            elif what == 2:
                out[at:at] = out[at:to]
            elif what == 3:
                out[at:at] = draw.choice(signs)
            else:
                out = out[:at]
        yield bytes(out)


def broken_models(folder: Path) -> Iterator[tuple[str, Path]]:
    """Folders that look like a model with its tokenizer and are none."""
    import shutil

    sound = tiny.save(folder / "sound", layers=1)
    changes: dict[str, tuple[str, bytes]] = {
        "a cut weights file": ("model.safetensors", (sound / "model.safetensors").read_bytes()[:5000]),
        "weights of zeros": ("model.safetensors", bytes(5000)),
        "a header of 2⁶³ bytes": ("model.safetensors", b"\xff" * 8 + b"{}"),
        "no JSON in config": ("config.json", b"{"),
        "a list for config": ("config.json", b"[]"),
        "an unknown architecture": ("config.json", b'{"model_type": "no-such", "architectures": ["X"]}'),
        "remote code": ("config.json", b'{"model_type": "x", "auto_map": {"AutoConfig": "evil.Config"}}'),
        "sizes below zero": ("config.json", b'{"model_type": "llama", "hidden_size": -4, "num_attention_heads": 0}'),
        "no JSON in tokenizer": ("tokenizer.json", b"\xff\xfe"),
        "a tokenizer of nothing": ("tokenizer.json", b"{}"),
        "tokenizer remote code": (
            "tokenizer_config.json", b'{"auto_map": {"AutoTokenizer": ["evil.T", null]}, "tokenizer_class": "T"}'),
        "a length that is text": (
            "tokenizer_config.json", b'{"model_max_length": "many", "tokenizer_class": "PreTrainedTokenizerFast"}'),
    }  # fmt: skip
    for i, (name, (file, data)) in enumerate(changes.items()):
        place = folder / f"model-{i}"
        shutil.copytree(sound, place)
        (place / file).write_bytes(data)
        (place / "evil.py").write_text("open('OWNED', 'w').write('x')\nclass Config: ...\nclass T: ...\n")
        yield name, place
