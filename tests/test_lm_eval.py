"""lm-eval through the bridge: its metrics against hand computation, its likelihoods against the library's own losses."""

from __future__ import annotations

import gzip
import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import talker
import tiny
from llmselect import harness
from llmselect.chat import ChatEncoder
from llmselect.cli import app
from llmselect.errors import LlmselectError, MissingExtra, UsageError
from llmselect.generate import generate
from llmselect.harness import eval_results_yaml, lm_eval, span_scores
from llmselect.pool import load_pool

pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return talker.save(tmp_path_factory.mktemp("talker") / "model")


@pytest.fixture(scope="module")
def adapter(model, tmp_path_factory) -> Path:
    return talker.save_adapter(tmp_path_factory.mktemp("talker") / "lora", model)


def write(folder: Path, task: str, rows: list[dict]) -> Path:
    (folder / task).mkdir(parents=True, exist_ok=True)
    with gzip.open(folder / task / "test.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return folder


def row(question: str, said: str, answer: str, choices=()) -> dict:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": said}]
    return {"id": question, "messages": turns, "answer": answer, "choices": list(choices)}


def quiz(count: int) -> list[dict]:
    letters = "ABCDE"
    rows = []
    for i, chat in enumerate(tiny.chats(count, 3)):
        choices = ["one", "two words", "Paris", "the fox", "seven"][: 4 + i % 2]
        listed = "\n".join(f"({letter}) {text}" for letter, text in zip(letters, choices, strict=False))
        answer = letters[i % len(choices)]
        rows.append(row(f"{chat[-2]['content']}\n{listed}", f"({answer})", answer, choices))
    return rows


@torch.no_grad()
def log_likelihood(loaded, folder: Path, messages, said: str) -> float:
    """Log-probability of `said` as the assistant's next words: one row, no cache, no padding, in float64."""
    from transformers import AutoTokenizer

    start = talker.prompt_ids(folder, messages)
    ids = start + AutoTokenizer.from_pretrained(folder)(said, add_special_tokens=False)["input_ids"]
    logits = loaded(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double().log_softmax(-1)
    return sum(float(logits[at - 1, ids[at]]) for at in range(len(start), len(ids)))


@pytest.mark.parametrize(("task", "with_adapter"), [("mmlu", False), ("csqa", True)])
def test_multiple_choice_is_the_likeliest_letter(model, adapter, tmp_path, task, with_adapter):
    rows = quiz(11)
    lora = adapter if with_adapter else None
    loaded = talker.load(model, lora)
    right = []
    for one in rows:
        options = [f"({letter})" for letter in "ABCDE"[: len(one["choices"])]]
        scores = [log_likelihood(loaded, model, one["messages"][:1], option) for option in options]
        right.append(options[int(np.argmax(scores))] == f"({one['answer']})")
    found = lm_eval(str(model), [f"{task}_chat"], data=write(tmp_path, task, rows), adapter=lora and str(lora), batch_size=3)
    assert 0 < np.mean(right) < 1, "the rows should tell a right answer from a wrong one"
    acc = found["tasks"][f"{task}_chat"]["acc"]
    assert acc["value"] == pytest.approx(np.mean(right))
    assert acc["stderr"] == pytest.approx(np.std(right, ddof=1) / math.sqrt(len(right)))
    assert found["samples"] == {f"{task}_chat": 11} and found["versions"]["tasks"] == {f"{task}_chat": 1.0}
    json.dumps(found, allow_nan=False)


LIKELIHOOD = """
task: reference
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{messages[0]['content']}}}}"
doc_to_target: "{{{{messages[1]['content']}}}}<|im_end|>"
metric_list:
  - {{metric: perplexity, aggregation: perplexity, higher_is_better: false}}
"""


def test_likelihoods_of_an_adapter_are_those_of_the_librarys_own_losses(model, adapter, tmp_path):
    from transformers import AutoTokenizer

    from llmselect.evaluate import row_losses

    # lm-eval counts blanks at the end of a prompt to the answer, so this template ends its prompt with a colon.
    model = shutil.copytree(model, tmp_path / "model")
    made = tiny.CHATML.replace("['role'] }}\n", "['role'] }}:").replace("assistant\n", "assistant:")
    assert made.count(":") == 2
    (model / "chat_template.jinja").write_text(made)

    chats = [chat[-2:] for chat in tiny.chats(9, 8)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "reference.yaml").write_text(LIKELIHOOD.format(file=file))

    pool = load_pool(str(file))
    encoder = ChatEncoder(AutoTokenizer.from_pretrained(model), 512)
    tokens = np.array([int(one.response.sum()) for one in encoder.encode(list(pool["messages"]))])
    for lora in (None, str(adapter)):
        nll = row_losses(str(model), lora, {"t": pool})["t"]
        found = lm_eval(str(model), ["reference"], include=tmp_path / "tasks", adapter=lora)
        value = found["tasks"]["reference"]["perplexity"]["value"]
        assert math.log(value) == pytest.approx(float((nll * tokens).mean()), rel=1e-5)
    assert len(pool) == 9


@pytest.mark.parametrize("base", [False, True])
def test_generated_numbers_are_those_of_our_own_generation(model, tmp_path, base):
    asked = [row(f"{i}{i} plus {i}?", "x", "none") for i in range(8)]
    answers = generate(str(model), [one["messages"][:1] for one in asked], max_new_tokens=400)
    numbers = [re.findall(r"\d+", one.text) for one in answers]
    assert any(numbers), "the model should say some numbers"
    for i, (one, said) in enumerate(zip(asked, numbers, strict=True)):
        one["answer"] = said[-1] if said and i % 2 else "none"
    right = [one["answer"] != "none" for one in asked]
    # A base model's tokenizer names another end: what it says after the turn's end must not count.
    asking = talker.as_base(model, tmp_path / "base") if base else model
    found = lm_eval(str(asking), ["gsm8k_chat"], data=write(tmp_path, "gsm8k", asked))
    assert 0 < np.mean(right) < 1
    assert found["tasks"]["gsm8k_chat"]["exact_match,last-number"]["value"] == pytest.approx(np.mean(right))


def filtered(suite: str, said: str) -> str:
    """What a suite's regex keeps of an answer, by lm-eval's own filter."""
    import yaml
    from lm_eval.filters.extraction import RegexFilter

    text = (harness.suites() / f"{suite}.yaml").read_text("utf-8").replace("!function ", "")
    settings = dict(yaml.safe_load(text)["filter_list"][0]["filter"][0])
    assert settings.pop("function") == "regex"
    return RegexFilter(**settings).apply([[said]], [{}])[0][0]


@pytest.mark.parametrize(
    ("suite", "said", "kept"),
    [
        ("gsm8k", "16 - 3 = 13 eggs.\nThe answer is 18.", "18"),
        ("gsm8k", "so $1,250.50 it is.", "$1,250.50"),
        ("gsm8k", "The answer is -10", "-10"),
        ("gsm8k", "that is 5-3", "3"),
        ("gsm8k", "no idea", "[invalid]"),
        ("bbh", "False", "False"),
        ("bbh", "Let us see.\nSo the answer is (B).", "(B)"),
        ("bbh", "The answer is no, but then the answer is: yes ", "yes"),
        ("bbh", "Thinking aloud.\n] ) }", "] ) }"),
        ("bbh", "", "[invalid]"),
    ],
)
def test_suites_find_the_answer_in_what_is_said(suite, said, kept):
    assert filtered(suite, said) == kept


@pytest.mark.parametrize(
    ("said", "references", "exact", "f1"),
    [
        ("The Panthers!", ["panthers"], 1, 1),
        ("308 points", ["308", "three hundred"], 0, 2 / 3),
        ("a b b c", ["b b d", "x"], 0, 2 * 2 / 6),  # "a" is an article; two of three words are shared either way
        ("", ["x"], 0, 0),
        ("the", ["a"], 1, 1),
    ],
)
def test_spans_score_as_squad_does(said, references, exact, f1):
    found = span_scores({"answer": json.dumps(references)}, [said])
    assert found == {"exact_match": exact, "f1": pytest.approx(f1)}


def test_a_span_suite_means_its_scores(model, tmp_path):
    asked = [row(f"Where is {i}?", "Paris", json.dumps(["Paris"])) for i in range(4)]
    answers = generate(str(model), [one["messages"][:1] for one in asked], max_new_tokens=64, stop=["\n"])
    asked[0]["answer"] = json.dumps(["no", answers[0].text])
    scores = [span_scores(one, [said.text])["f1"] for one, said in zip(asked, answers, strict=True)]
    found = lm_eval(str(model), ["xquad_chat"], data=write(tmp_path, "xquad_en", asked))["tasks"]["xquad_chat"]
    assert scores[0] == 1 and found["f1"]["value"] == pytest.approx(np.mean(scores))
    assert found["exact_match"]["value"] == pytest.approx(np.mean([score == 1 for score in scores]))


def test_tasks_model_and_data_are_checked_before_weights_load(model, tmp_path, monkeypatch):
    import lm_eval as package
    from lm_eval import tasks as registry

    real, read = registry.TaskManager, []

    def manager(*args, include_defaults=True, **more):
        read.append(include_defaults)  # lm-eval's own thousands take many seconds: a stand-in for them
        return real(*args, include_defaults=False, **more) if not include_defaults else SimpleNamespace(all_tasks=["hellaswag"])

    monkeypatch.setattr(registry, "TaskManager", manager)
    monkeypatch.setattr(package, "simple_evaluate", lambda **_: pytest.fail("the evaluation started"))
    monkeypatch.delenv(harness.DATA, raising=False)
    ask = lambda *tasks, **options: lm_eval(str(model), tasks, **options)  # noqa: E731
    for call, message in [
        (lambda: ask(), "tasks: none given"),
        (lambda: ask("gsm8k_chta"), r"no 'gsm8k_chta'\. Did you mean 'gsm8k_chat'\? Here: bbh_chat, csqa_chat"),
        (lambda: ask("helaswag"), r"no 'helaswag'\. Did you mean 'hellaswag'\?"),
        (lambda: ask("gsm8k_chat"), r"reads gsm8k/test\.jsonl\.gz and no data folder is given; type --data DIR"),
        (lambda: ask("gsm8k_chat", data=tmp_path), r"data: no file .*gsm8k/test\.jsonl\.gz"),
        (lambda: ask("gsm8k_chat", include=tmp_path / "no"), r"include: no folder"),
        (lambda: ask("gsm8k_chat", limit=0), r"limit: 0 leaves no rows"),
        (lambda: ask("gsm8k_chat", adapter=str(tmp_path)), r"adapter: "),
    ]:
        with pytest.raises(UsageError, match=message):
            call()
    write(tmp_path, "gsm8k", [row("1?", "1", "1")])
    with pytest.raises(UsageError, match=r"cannot read '\./no-model'"):
        lm_eval("./no-model", ["gsm8k_chat"], data=tmp_path)
    (tmp_path / "gsm8k" / "test.jsonl.gz").write_bytes(gzip.compress(b'{"id": 1}\nnot json\n'))
    with pytest.raises(LlmselectError, match=r"test\.jsonl\.gz:2: not JSON"):
        ask("gsm8k_chat", data=tmp_path)
    assert read.count(True) == 2, "lm-eval's own tasks are read for unknown names only"


def test_a_missing_lm_eval_names_its_extra(model, monkeypatch):
    def gone(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr("llmselect.errors.importlib", SimpleNamespace(import_module=gone))
    with pytest.raises(MissingExtra, match=r"lm_eval is not installed; type: pip install 'llmselect\[eval\]'"):
        lm_eval(str(model), ["gsm8k_chat"])


RESULTS = {
    "tasks": {
        "gsm8k_chat": {"exact_match,last-number": {"value": 0.25, "stderr": 0.1}},
        "xquad_chat": {"f1": {"value": 0.5, "stderr": None}, "exact_match": {"value": 0.0, "stderr": None}},
    }
}


def test_eval_results_are_read_by_the_hubs_own_parser(tmp_path):
    import yaml
    from huggingface_hub import parse_eval_result_entries

    files = eval_results_yaml(
        tmp_path, RESULTS,
        {"gsm8k_chat": {"id": "openai/gsm8k", "task_id": "gsm8k"},
         "xquad_chat": {"id": "google/xquad", "task_id": "default", "metric": "f1"}},
        date="2026-01-02", source={"url": "https://example.org/run", "name": "a run"}, notes="zero-shot",
    )  # fmt: skip
    assert [str(file.relative_to(tmp_path / ".eval_results")) for file in files] == ["gsm8k_chat.yaml", "xquad_chat.yaml"]
    entries = [parse_eval_result_entries(yaml.safe_load(file.read_text()))[0] for file in files]
    told = [(e.dataset_id, e.task_id, e.value) for e in entries]
    assert told == [("openai/gsm8k", "gsm8k", 0.25), ("google/xquad", "default", 0.5)]
    about = {(e.date, e.source_url, e.source_name, e.source_user, e.notes) for e in entries}
    assert about == {("2026-01-02", "https://example.org/run", "a run", None, "zero-shot")}


@pytest.mark.parametrize(
    ("datasets", "source", "message"),
    [
        ({"gsm8k": {"id": "a/b", "task_id": "c"}}, None, "no task 'gsm8k' in the results"),
        ({"gsm8k_chat": {"id": "a/b"}}, None, "give id, task_id"),
        ({"xquad_chat": {"id": "a/b", "task_id": "c"}}, None, "metric: None is not one of f1, exact_match"),
        ({"gsm8k_chat": {"id": "a/b", "task_id": "c"}}, {"name": "n"}, "source: .* give url"),
    ],
)
def test_eval_results_that_say_too_little_are_refused(tmp_path, datasets, source, message):
    with pytest.raises(UsageError, match=message):
        eval_results_yaml(tmp_path, RESULTS, datasets, source=source)
    assert not list(tmp_path.iterdir())


def test_the_commands(model, adapter, tmp_path):
    asked = [row(f"{i} plus {i}?", "x", "1") for i in range(3)]
    data = write(tmp_path, "gsm8k", asked)
    run = lambda *arguments: CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)  # noqa: E731
    done = run("lm-eval", model, "--tasks", "gsm8k_chat", "--data", data, "--limit", 2, "--adapter", adapter, "--json")
    found = json.loads(done.stdout)
    assert found["samples"] == {"gsm8k_chat": 2} and found["settings"]["adapter"] == str(adapter)
    assert "| gsm8k_chat | exact_match,last-number | " in run("lm-eval", model, "--tasks", "gsm8k_chat", "--data", data).stdout

    out = tmp_path / "out.jsonl"
    done = run("generate", model, data / "gsm8k" / "test.jsonl.gz", out, "--max-new-tokens", 6, "--limit", 2, "--stop", "zz")
    assert done.stdout == f"2 answers in {out}\n"
    expected = generate(str(model), [one["messages"][:1] for one in asked[:2]], max_new_tokens=6)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(one["id"], one["text"]) for one in rows] == [(a["id"], e.text) for a, e in zip(asked, expected, strict=False)]
    (tmp_path / "bad.jsonl").write_text('{"prompt": "hi"}\n{"messages": [{"role": "robot", "content": "hi"}]}\n')
    with pytest.raises(UsageError, match=r"bad\.jsonl:2: turn 0 has role 'robot'"):
        run("generate", model, tmp_path / "bad.jsonl", tmp_path / "o.jsonl")
    with pytest.raises(UsageError, match=r"no file .*none\.jsonl"):
        run("generate", model, tmp_path / "none.jsonl", tmp_path / "o.jsonl")
