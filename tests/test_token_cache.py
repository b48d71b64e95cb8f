"""Tokens made once: what is kept is what the encoder makes, whoever asks and whatever happened to the files."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tiny
from llmselect import atomic
from llmselect.chat import ChatEncoder, Encoded
from llmselect.comparison import evaluate_stage, train_stage
from llmselect.engine.backbone import Backbone
from llmselect.prepare import prepare
from llmselect.recipe import load_recipe
from llmselect.stages import Run, extract_stage, select_stage
from llmselect.token_cache import Index, TokenCache, digest, short

CHATS = tiny.chats(100)
TEMPLATE = "{% for m in messages %}{{ m['role'] }} says {{ m['content'] }}\n{% endfor %}"


def same(found: list[Encoded], expected: list[Encoded]) -> None:
    for a, b in zip(found, expected, strict=True):
        for key in ("ids", "response", "content"):
            np.testing.assert_array_equal(getattr(a, key), getattr(b, key))
            assert getattr(a, key).dtype == getattr(b, key).dtype and getattr(a, key).flags.writeable
        assert (a.prompt_cut, a.response_cut) == (b.prompt_cut, b.response_cut)


class Counted:
    """An encoder, and how many conversations it was asked for."""

    def __init__(self, length: int = 24):
        self.encoder, self.rows = ChatEncoder(tiny.tokenizer(), length), 0

    def __call__(self, conversations: Any) -> list[Encoded]:
        self.rows += len(conversations)
        return self.encoder.encode(conversations)


def test_rows_are_encoded_once_and_read_in_any_order(tmp_path: Path) -> None:
    plain, encode = ChatEncoder(tiny.tokenizer(), 24).encode(CHATS), Counted()
    assert any(row.prompt_cut for row in plain) and any(row.response_cut for row in plain)
    cache = TokenCache(tmp_path)
    same(cache.encode(CHATS[:40], encode), plain[:40])
    same(cache.encode(CHATS, encode), plain)
    assert encode.rows == 100
    for one in (cache, TokenCache(tmp_path)):
        order = np.random.default_rng(0).permutation(100)
        same(one.encode([CHATS[i] for i in order], encode), [plain[i] for i in order])
    assert encode.rows == 100 and len(list(tmp_path.iterdir())) == 2
    assert cache.encode([], encode) == []


def test_few_rows_are_not_worth_a_file(tmp_path: Path) -> None:
    encode = Counted()
    TokenCache(tmp_path).encode(CHATS[:31], encode)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("at", [0, 4, 9, 40, 200, 800, -1, None])
@pytest.mark.parametrize("opened", [True, False], ids=["open", "opened after"])
def test_a_damaged_file_is_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture, at: int | None, opened: bool) -> None:
    plain, encode = ChatEncoder(tiny.tokenizer(), 24).encode(CHATS), Counted()
    TokenCache(tmp_path).encode(CHATS, encode)
    cache = TokenCache(tmp_path) if opened else None
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[:50] if at is None else whole[:at] + bytes([whole[at] ^ 0x41]) + whole[at:][1:])
    with caplog.at_level(logging.WARNING, "llmselect"):
        same((cache or TokenCache(tmp_path)).encode(CHATS, encode), plain)
    assert encode.rows == 200 and "tokenised again" in caplog.text
    assert file.read_bytes() == whole  # the same rows again, whole


def test_a_file_of_something_else_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes((2).to_bytes(8, "little") + b"[]")
    encode = Counted()
    TokenCache(tmp_path).encode(CHATS[:4], encode)
    assert encode.rows == 4 and not list(tmp_path.iterdir())


def test_a_lost_file_is_made_again(tmp_path: Path) -> None:
    plain, encode = ChatEncoder(tiny.tokenizer(), 24).encode(CHATS), Counted()
    TokenCache(tmp_path).encode(CHATS, encode)
    cache = TokenCache(tmp_path)
    next(tmp_path.iterdir()).unlink()
    same(cache.encode(CHATS, encode), plain)
    assert encode.rows == 200


def test_another_length_has_tokens_of_its_own(tmp_path: Path, tiny_model: Path) -> None:
    for length in (24, 48, 24):
        one = Backbone(str(tiny_model), max_length=length, tokens=tmp_path / "kept").encoder
        same(one.encode(CHATS), ChatEncoder(one.tokenizer, length).encode(CHATS))
    assert len(list((tmp_path / "kept").iterdir())) == 2


@pytest.mark.parametrize("setting", [{"split_special_tokens": True}, {"extra_special_tokens": []}, {"chat_template": TEMPLATE}],
                         ids=["split", "special", "template"])  # fmt: skip
def test_a_setting_of_the_tokenizer_that_changes_tokens_has_a_folder_of_its_own(
    tmp_path: Path, tiny_model: Path, setting: dict[str, Any]
) -> None:
    """`tokenizer_config.json` changes where `tokenizer.json` does not: the tokens kept before are not those made now."""
    model = shutil.copytree(tiny_model, tmp_path / "model")
    chat = [{"role": "user", "content": "say <|im_start|> please"}, {"role": "assistant", "content": "say <|im_start|> please"}]
    chats, about = [chat] * 40, model / "tokenizer_config.json"
    before = Backbone(str(model), max_length=48, tokens=tmp_path / "kept").encoder.encode(chats)
    if "chat_template" in setting:
        (model / "chat_template.jinja").write_text(setting["chat_template"])
    about.write_text(json.dumps(json.loads(about.read_text()) | setting))
    after = Backbone(str(model), max_length=48, tokens=tmp_path / "kept").encoder
    same(after.encode(chats), ChatEncoder(after.tokenizer, 48).encode(chats))
    with pytest.raises(AssertionError):  # or the setting would change nothing
        same(after.encode(chats), before)


def test_rows_made_again_are_found_where_they_lie_now(tmp_path: Path) -> None:
    encode, cache = Counted(), TokenCache(tmp_path)
    cache.encode(CHATS, encode)
    next(tmp_path.iterdir()).unlink()
    plain = cache.encode(CHATS[::-1], encode)  # another file, for the order is another
    same(cache.encode(CHATS[::-1], encode), plain)
    assert encode.rows == 200 and len(list(tmp_path.iterdir())) == 1


def test_a_file_that_another_process_drops_meanwhile_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, encode = ChatEncoder(tiny.tokenizer(), 24).encode(CHATS), Counted()
    TokenCache(tmp_path).encode(CHATS, encode)
    kept = atomic.sha256_file

    def dropped(file: Path) -> str:
        file.unlink()
        return kept(file)

    monkeypatch.setattr(atomic, "sha256_file", dropped)
    same(TokenCache(tmp_path).encode(CHATS, encode), plain)
    assert encode.rows == 200


def test_an_equal_half_of_a_key_is_not_taken_for_the_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmselect.token_cache.digest", lambda one: b"8 bytes." + digest(one)[8:])
    plain, encode = ChatEncoder(tiny.tokenizer(), 24).encode(CHATS), Counted()
    cache = TokenCache(tmp_path)
    same(cache.encode(CHATS, encode), plain)
    same(cache.encode(CHATS, encode), plain)
    assert encode.rows == 199  # of a hundred that look the same one is found


@given(st.lists(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=20), max_size=30, unique_by=tuple))
def test_the_index_finds_what_joined_it(batches: list[list[int]]) -> None:
    index, known = Index(), dict[int, int]()
    for batch in batches:
        keys = np.array([one for one in dict.fromkeys(batch) if one not in known], np.uint64)
        places = np.arange(len(known), len(known) + len(keys))
        known |= dict(zip(keys.tolist(), places.tolist(), strict=True))
        if len(keys):
            index.add(keys, places)
    asked = [*known, *(one ^ 1 for one in known)]
    np.testing.assert_array_equal(index.find(np.array(asked, np.uint64)), [known.get(one, -1) for one in asked])
    assert len(index.runs) <= 1 + np.log2(len(known) + 1)


def test_short_keys_are_the_first_half() -> None:
    keys = np.arange(32, dtype=np.uint8).reshape(2, 16)
    assert short(keys).tobytes() == keys[:, :8].tobytes()


def test_a_run_tokenises_a_row_once(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Preparing encodes the pool; extraction, training and evaluation of two arms read it."""
    rows = {"pool": tiny.chats(60), "dev": tiny.chats(4, 50), "test": tiny.chats(4, 60)}
    for name, chats in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    (tmp_path / "recipe.yaml").write_text(json.dumps({
        "name": "once", "out": str(tmp_path / "run"), "model": {"path": str(tiny_model), "max_length": 96},
        "pool": {"path": str(tmp_path / "pool.jsonl")},
        "targets": {"t": {"dev": str(tmp_path / "dev.jsonl"), "test": str(tmp_path / "test.jsonl")}},
        "features": {"loss": {"extractor": "loss"}, "trim": {"extractor": "trim"}}, "budget": "25%", "seeds": [0],
        "methods": {"random": {"selector": "random"}, "trim": {"selector": "topk", "x": "trim"}},
        "train": {"tokens": 60, "batch_tokens": 60},
    }))  # fmt: skip
    run, asked = Run(load_recipe(tmp_path / "recipe.yaml")), list[str]()
    kept = ChatEncoder._layout

    def counted(self: Any, messages: Any) -> Any:
        asked.append(digest(messages).hex())
        return kept(self, messages)

    monkeypatch.setattr(ChatEncoder, "_layout", counted)
    for stage in (prepare, extract_stage, select_stage, train_stage, evaluate_stage):
        stage(run)
    pool = {digest(one).hex() for one in run.opened("pool")["messages"]}
    assert len(pool) == 60 and sorted(one for one in asked if one in pool) == sorted(pool)
