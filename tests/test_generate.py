"""Generation against an independent loop: one row at a time, no cache, no padding."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

import talker
import tiny
from llmselect import backends
from llmselect.engine.decoding import Choose
from llmselect.errors import LlmselectError, UsageError
from llmselect.generate import generate, generate_to
from llmselect.kernels.keyed import Keyed
from talker import END, questions


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return talker.save(tmp_path_factory.mktemp("talker") / "model")


@pytest.fixture(scope="module")
def adapter(model, tmp_path_factory) -> Path:
    return talker.save_adapter(tmp_path_factory.mktemp("talker") / "lora", model)


def test_greedy_answers_are_those_of_a_loop_without_cache_batches_or_padding(model):
    prompts = questions(12)
    found = generate(str(model), prompts, max_new_tokens=20, batch_tokens=400)
    loaded, fast = talker.load(model), AutoTokenizer.from_pretrained(model)
    expected = [talker.greedy(loaded, talker.prompt_ids(model, messages), 20) for messages in prompts]
    assert [list(one.tokens) for one in found] == expected
    assert [one.text for one in found] == [fast.decode(ids, skip_special_tokens=True) for ids in expected]
    assert [one.finish for one in found] == ["stop" if ids[-1] == END else "length" for ids in expected]
    assert {one.finish for one in found} == {"stop", "length"}, "the model should end some answers and not others"
    assert all(len(one.tokens) == 20 for one in found if one.finish == "length")


def test_a_sliding_window_keeps_the_cache_right(tmp_path):
    folder = tiny.save(tmp_path / "window", seed=2, window=16)
    prompts = questions(5)
    found = generate(str(folder), prompts, max_new_tokens=12)
    loaded = talker.load(folder)
    assert [list(one.tokens) for one in found] == [talker.greedy(loaded, talker.prompt_ids(folder, m), 12) for m in prompts]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_batch_changes_no_answer(model, temperature):
    prompts = questions(9)
    options = dict(max_new_tokens=10, temperature=temperature, seed=3)
    together = generate(str(model), prompts, batch_tokens=100_000, **options)
    assert generate(str(model), prompts, batch_tokens=1, **options) == together
    assert generate(str(model), prompts[::-1], batch_tokens=300, **options) == together[::-1]
    assert generate(str(model), prompts[4:5], **options) == together[4:5]


def test_draws_repeat_by_seed_and_differ_between_seeds_and_equal_prompts(model):
    prompts = questions(3) * 2
    options = dict(max_new_tokens=15, temperature=1.0)
    first = generate(str(model), prompts, seed=1, **options)
    assert generate(str(model), prompts, seed=1, **options) == first
    assert generate(str(model), prompts, seed=2, **options) != first
    assert first[:3] != first[3:]


def test_draws_follow_the_softmax_cut_to_its_nucleus():
    rows, logits = 40_000, np.array([1.0, 0.0, 2.0, -1.0, 0.5])
    probability = np.exp(logits / 0.7) / np.exp(logits / 0.7).sum()
    order = np.argsort(-probability)
    kept = order[: int(np.searchsorted(np.cumsum(probability[order]), 0.9)) + 1]  # the fewest with at least 0.9
    expected = np.zeros(5)
    expected[kept] = probability[kept] / probability[kept].sum()
    assert 1 < len(kept) < 5
    keyed = Keyed(0, np.arange(rows, dtype=np.uint64))
    choose = Choose(keyed, 0.7, 0.9, 0, [])
    taken = choose(torch.zeros(rows, 0), torch.tensor(logits).float().expand(rows, 5)).argmax(-1)
    share = np.bincount(taken.numpy(), minlength=5) / rows
    np.testing.assert_allclose(share, expected, atol=4 * np.sqrt(0.25 / rows))
    assert (share[expected == 0] == 0).all()


def test_a_stop_string_ends_the_answer_before_it(model):
    prompts = questions(8)
    whole = generate(str(model), prompts, max_new_tokens=24)
    stop = whole[0].text[6:9]
    found = generate(str(model), prompts, max_new_tokens=24, stop=[stop])
    assert [one.text for one in found] == [one.text.split(stop)[0] for one in whole]
    assert found[0].finish == "stop" and len(found[0].tokens) < len(whole[0].tokens)
    assert [one.tokens for one in found] == [w.tokens[: len(one.tokens)] for one, w in zip(found, whole, strict=True)]
    untouched = [(one, w) for one, w in zip(found, whole, strict=True) if stop not in w.text]
    assert untouched and all(one == w for one, w in untouched)


def test_a_special_token_can_be_a_stop_string(model):
    whole = generate(str(model), questions(8), max_new_tokens=24, temperature=2.0)
    fast = AutoTokenizer.from_pretrained(model)
    token = next(t for one in whole for t in one.tokens if t in fast.all_special_ids and t != END)
    found = generate(str(model), questions(8), max_new_tokens=24, temperature=2.0, stop=[fast.decode([token])])
    cut = [one.tokens.index(token) + 1 if token in one.tokens else None for one in whole]
    assert [one.tokens for one in found] == [w.tokens[:n] for w, n in zip(whole, cut, strict=True)]


def test_the_end_mark_of_the_template_ends_answers_that_the_tokenizer_would_not(model, tmp_path):
    talker.as_base(model, tmp_path / "base")
    prompts = questions(12)
    found = generate(str(tmp_path / "base"), prompts, max_new_tokens=20)
    assert END in {one.tokens[-1] for one in found}
    assert found == generate(str(model), prompts, max_new_tokens=20)


def test_settings_of_the_checkpoint_do_not_join_in(model, tmp_path):
    shutil.copytree(model, tmp_path / "m")
    about = json.loads((tmp_path / "m" / "generation_config.json").read_text())
    (tmp_path / "m" / "generation_config.json").write_text(json.dumps({**about, "repetition_penalty": 5.0, "max_length": 3}))
    assert generate(str(tmp_path / "m"), questions(4), max_new_tokens=12) == generate(str(model), questions(4), max_new_tokens=12)


def test_an_adapter_speaks(model, adapter):
    prompts = questions(6)
    found = generate(str(model), prompts, adapter=str(adapter), max_new_tokens=12)
    loaded = talker.load(model, adapter)
    assert [list(one.tokens) for one in found] == [talker.greedy(loaded, talker.prompt_ids(model, m), 12) for m in prompts]
    assert found != generate(str(model), prompts, max_new_tokens=12)


def test_no_prompts_give_no_answers_and_load_nothing():
    assert generate("no-such-model", []) == []


def test_wrong_calls_are_told_before_weights_load(model, monkeypatch, tmp_path):
    monkeypatch.setattr("llmselect.engine.backbone.Backbone.causal_lm", property(lambda _: pytest.fail("weights were loaded")))
    ask = lambda prompts=None, **options: generate(str(model), prompts or questions(1), **options)  # noqa: E731
    long = [*questions(2), [{"role": "user", "content": "What is three plus four? " * 90}]]
    for call, message in [
        (lambda: ask(long), r"prompts\[2\] has \d+ tokens; with max_new_tokens=256 .* max_length=512"),
        (lambda: ask(tiny.chats(1)), r"prompts\[0\] ends with a turn of the assistant"),
        (lambda: ask([[]]), r"prompts\[0\] has no turns"),
        (lambda: ask(backend="vlm"), r"no 'vlm'\. Did you mean 'vllm'\? One of: hf, vllm"),
        (lambda: ask(temperature=-1), r"temperature: -1"),
        (lambda: ask(top_p=0), r"top_p: 0"),
        (lambda: ask(max_new_tokens=0), r"max_new_tokens: 0"),
        (lambda: ask(stop=""), r"stop: ''"),
        (lambda: ask(dtype="float31"), r"dtype: 'float31' is not allowed\. Did you mean 'float32'"),
        (lambda: ask(adapter=str(tmp_path)), r"adapter: .* is no folder with an adapter_config"),
        (lambda: generate_to(tmp_path / "o", ["a", "a"], questions(2), model=str(model)), r"'a' stands for several"),
    ]:
        with pytest.raises(UsageError, match=message):
            call()
    with pytest.raises(UsageError, match=r"prompts\[1\] \(b\) has \d+ tokens"):
        generate_to(tmp_path / "o", ["a", "b"], long[1:], model=str(model))
    assert not list(tmp_path.iterdir())


def test_nan_names_the_row():
    choose = Choose(Keyed(0, np.zeros(2, np.uint64)), 0.0, 1.0, 0, ["prompts[0]", "prompts[1]"])
    with pytest.raises(LlmselectError, match=r"prompts\[1\]: the model gives NaN"):
        choose(torch.zeros(2, 1), torch.tensor([[0.0, 1.0], [0.0, torch.nan]]))


IDS = [f"row-{i}" for i in range(10)]
OPTIONS = dict(max_new_tokens=8, temperature=0.7, chunk=3)
KILLED = """
import os, signal
from llmselect import backends
from llmselect.generate import generate_to

ran, real = [], backends.HFBackend.generate
def generate(self, some, sampling):
    if len(ran) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    ran.append(some)
    return real(self, some, sampling)

backends.HFBackend.generate = generate
generate_to({out!r}, {ids!r}, {prompts!r}, model={model!r}, **{options!r})
"""


def test_a_killed_file_goes_on_and_ends_with_the_same_bytes(model, tmp_path, monkeypatch):
    prompts = questions(5) * 2  # equal prompts: their draws must not depend on where the run was killed
    whole = generate_to(tmp_path / "whole.jsonl", IDS, prompts, model=str(model), **OPTIONS).read_bytes()
    answers = generate(str(model), prompts, max_new_tokens=8, temperature=0.7)
    rows = [json.loads(line) for line in whole.splitlines()]
    assert rows == [{"id": i, "text": a.text, "tokens": len(a.tokens), "finish": a.finish}
                    for i, a in zip(IDS, answers, strict=True)]  # fmt: skip

    out, part = tmp_path / "out.jsonl", tmp_path / "out.jsonl.part"
    script = KILLED.format(out=str(out), ids=IDS, prompts=prompts, model=str(model), options=OPTIONS)
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=120).returncode == -signal.SIGKILL
    assert not out.exists() and part.read_bytes() == b"".join(whole.splitlines(True)[:6])
    rest = b"".join(whole.splitlines(True)[6:])
    part.write_bytes(part.read_bytes() + rest[: rest.index(b"\n") + 9])  # a kill in the middle of a write

    ran, real = [], backends.HFBackend.generate
    count = lambda self, some, sampling: ran.extend(one.name for one in some) or real(self, some, sampling)  # noqa: E731
    monkeypatch.setattr(backends.HFBackend, "generate", count)
    generate_to(out, IDS, prompts, model=str(model), **OPTIONS)
    assert out.read_bytes() == whole and not part.exists()
    assert ran == [f"prompts[{i}] ({IDS[i]})" for i in range(6, 10)], "whole chunks are not made again, a cut one is"
    generate_to(out, IDS, prompts, model=str(model), **OPTIONS)
    assert out.read_bytes() == whole and len(ran) == 4


def test_a_file_made_from_something_else_is_refused(model, adapter, tmp_path):
    out = generate_to(tmp_path / "out.jsonl", ["a"], questions(1), model=str(model), max_new_tokens=3)
    for changed, line in [
        (dict(max_new_tokens=4), "sampling.max_new_tokens: 3 -> 4"),
        (dict(adapter=str(adapter)), "model: "),
        (dict(prompts=questions(1, seed=9)), "prompts.sha256: "),
    ]:
        options = {"prompts": questions(1), "model": str(model), "max_new_tokens": 3, **changed}
        with pytest.raises(LlmselectError, match=line):
            generate_to(out, ["a"], **options)
    (tmp_path / "other.jsonl").write_text("mine")
    with pytest.raises(LlmselectError, match=r"other\.jsonl exists"):
        generate_to(tmp_path / "other.jsonl", ["a"], questions(1), model=str(model))
    assert (tmp_path / "other.jsonl").read_text() == "mine"


def test_no_prompts_make_an_empty_file(model, tmp_path):
    assert generate_to(tmp_path / "none.jsonl", [], [], model=str(model)).read_bytes() == b""


def test_prompts_are_read_from_every_format_without_their_answers(tmp_path):
    from llmselect.cli_models import read_prompts

    user, system, answer = ({"role": r, "content": c} for r, c in [("user", "hi"), ("system", "be kind"), ("assistant", "yes")])
    rows = [
        {"id": 7, "messages": [system, user, answer]},
        {"messages": [user, answer, user]},
        {"instruction": "add", "input": "1 2", "output": "3"},
        {"prompt": "hi"},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]},
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ids, asked = read_prompts(file)
    assert ids == ["7", "1", "2", "3", "4"]
    assert asked == [[system, user], [user, answer, user], [{"role": "user", "content": "add\n\n1 2"}], [user], [user]]
    assert read_prompts(file, limit=2) == (ids[:2], asked[:2])
    file.write_text(json.dumps({"text": "only an answer"}))
    with pytest.raises(UsageError, match=r"rows\.jsonl:1: there is no turn before the assistant's to answer"):
        read_prompts(file)
