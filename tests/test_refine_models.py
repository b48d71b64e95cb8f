"""Iterative refinement with real models: scores against plain loops, one recipe from pool to table, mistakes told early."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

import talker
import tiny
from llmselect import judges
from llmselect.errors import UsageError
from llmselect.recipe import load_recipe
from llmselect.refine import Round
from llmselect.refine_stage import expected, report_text
from llmselect.refine_steps import ModelSteps, Refine
from llmselect.selection import Selection
from llmselect.stages import Run
from llmselect.train import Train

PAIRS = 11


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return talker.save(tmp_path_factory.mktemp("talker") / "model")


def save_judge(folder: Path, labels: int = 1, pad: int | None = 1, template: str | None = tiny.CHATML) -> Path:
    """A tiny sequence-classification model with random weights."""
    fast = tiny.tokenizer(template)
    torch.manual_seed(7)
    shape = dict(vocab_size=len(fast), hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.3)  # fmt: skip
    config = LlamaConfig(**shape, num_labels=labels, pad_token_id=pad, eos_token_id=3)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def conversations(seed: int = 0) -> tuple[list, list[str], list[str]]:
    """Prompts, some with several turns; gold answers; other answers."""
    chats = tiny.chats(PAIRS, seed)
    others = [chat[-1]["content"] for chat in tiny.chats(PAIRS, seed + 1)]
    return [chat[:-1] for chat in chats], [chat[-1]["content"] for chat in chats], others


def written(messages) -> str:
    return "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)


def nll_by_hand(loaded, fast, prompt, answer: str) -> float:
    """Mean −log p of the answer's tokens and its end mark: one row, no padding, the chat marks written out."""
    before = written(prompt) + "<|im_start|>assistant\n"
    made = fast(before + answer + "<|im_end|>", add_special_tokens=False, return_offsets_mapping=True)
    first = next(i for i, (low, _) in enumerate(made["offset_mapping"]) if low >= len(before))
    ids = torch.tensor([made["input_ids"]])
    with torch.no_grad():
        logp = loaded(input_ids=ids, use_cache=False).logits[0].double().log_softmax(-1)
    return float(-np.mean([logp[t - 1, ids[0, t]] for t in range(first, ids.shape[1])]))


@pytest.mark.parametrize("batch_tokens", [1, 400])
def test_perplexity_scores_are_those_of_a_plain_loop(model, tmp_path, batch_tokens):
    adapter = talker.save_adapter(tmp_path / "lora", model)
    loaded, fast = talker.load(model, adapter), AutoTokenizer.from_pretrained(model)
    prompts, gold, others = conversations()
    assert any(m["role"] == "assistant" for prompt in prompts for m in prompt)
    found = judges.perplexity(prompts, gold, others, model=str(model), adapter=str(adapter), batch_tokens=batch_tokens)
    ratio = [np.exp(nll_by_hand(loaded, fast, p, o)) / np.exp(nll_by_hand(loaded, fast, p, g))
             for p, g, o in zip(prompts, gold, others, strict=True)]  # fmt: skip
    np.testing.assert_allclose(found, -np.log(ratio), rtol=1e-4, atol=1e-4)
    assert np.ptp(found) > 0.1


def test_perplexity_of_what_does_not_fit_is_no_number(model):
    prompts, gold, others = conversations()
    others[3] = "word " * 60
    found = judges.perplexity(prompts, gold, others, model=str(model), max_length=150)
    whole = judges.perplexity(prompts, gold, others, model=str(model))
    assert np.flatnonzero(np.isnan(found)).tolist() == [3] and np.isfinite(whole).all()
    np.testing.assert_allclose(np.delete(found, 3), np.delete(whole, 3), atol=1e-5)


def test_the_judge_is_who_the_recipe_says(model, tmp_path):
    adapter, other = talker.save_adapter(tmp_path / "adapter", model), tiny.save(tmp_path / "other")
    at, rows = Round(1, tmp_path, {"adapter": "adapter"}), conversations()
    own = {"current": (model, str(adapter)), "base": (model, None), str(other): (other, None)}
    found = {}
    for judge, (path, lora) in own.items():
        steps = ModelSteps(Refine(x="rds", judge=judge), str(model), Train()).steps
        found[judge] = steps.score(at, *rows)
        assert found[judge] == judges.perplexity(*rows, model=str(path), adapter=lora).tolist()
    assert len({one[0] for one in found.values()}) == 3
    rewarding = Refine(x="rds", scorer="reward", judge=str(save_judge(tmp_path / "judge")))
    rewards = ModelSteps(rewarding, str(model), Train()).steps.score(at, *rows)
    assert rewards == judges.reward(*rows, model=str(tmp_path / "judge")).tolist()


@pytest.mark.parametrize(("pad", "batch_tokens"), [(1, 1), (1, 500), (1, 100_000), (None, 100_000)])
def test_rewards_are_those_of_one_row_at_a_time(tmp_path, pad, batch_tokens):
    folder = save_judge(tmp_path / "judge", pad=pad)
    loaded = LlamaForSequenceClassification.from_pretrained(folder).eval()
    fast = AutoTokenizer.from_pretrained(folder)

    def rewarded(prompt, answer) -> float:
        text = written([*prompt, {"role": "assistant", "content": answer}])
        with torch.no_grad():
            return float(loaded(input_ids=torch.tensor([fast(text, add_special_tokens=False)["input_ids"]])).logits[0, 0])

    prompts, gold, others = conversations()
    found = judges.reward(prompts, gold, others, model=str(folder), batch_tokens=batch_tokens)
    each = [rewarded(p, g) - rewarded(p, o) for p, g, o in zip(prompts, gold, others, strict=True)]
    np.testing.assert_allclose(found, each, atol=1e-4)
    assert np.ptp(found) > 0.1
    np.testing.assert_array_equal(judges.reward(prompts, gold, others, model=str(folder), batch_tokens=batch_tokens), found)
    others[2] = "word " * 200
    short = judges.reward(prompts, gold, others, model=str(folder), max_length=200)
    assert np.flatnonzero(np.isnan(short)).tolist() == [2]


def test_models_that_give_no_rewards_are_refused(tmp_path, model):
    one = [[{"role": "user", "content": "hi"}]], ["yes"], ["no"]
    with pytest.raises(UsageError, match="has 2 outputs; give a reward model"):
        judges.reward(*one, model=str(save_judge(tmp_path / "two", labels=2)))
    with pytest.raises(UsageError, match="has no chat template"):
        judges.reward(*one, model=str(save_judge(tmp_path / "plain", template=None)))
    causal = tiny.save(tmp_path / "causal")
    about = json.loads((causal / "config.json").read_text())
    labels = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    (causal / "config.json").write_text(json.dumps({**about, **labels}))
    with pytest.raises(UsageError, match=r"its file lacks score\.weight"):
        judges.reward(*one, model=str(causal))


# The recipe


def lines(path: Path, chats) -> str:
    path.write_text("".join(json.dumps({"messages": c, "source": f"s{i % 3}"}) + "\n" for i, c in enumerate(chats)))
    return str(path)


def plan_of(folder: Path, model: Path, **more) -> Path:
    refining = {"x": "rds", "quality": "loss.nll", "clusters": 3, "probe": 2, "max_new_tokens": 8,
                "train": {"tokens": 120, "batch_tokens": 60, "lora": {"r": 2, "target_modules": ["q_proj"]}}}  # fmt: skip
    plan = {
        "name": "iterative",
        "out": str(folder / "run"),
        "model": {"path": str(model), "max_length": 200},
        "pool": {"path": lines(folder / "pool.jsonl", tiny.chats(60))},
        "targets": {"t": {"dev": lines(folder / "dev.jsonl", tiny.chats(4, 50)), "test": lines(folder / "test.jsonl",
                                                                                             tiny.chats(5, 70))}},
        "features": {"rds": {"extractor": "embedding"}, "loss": {"extractor": "loss", "without_prompt": False}},
        "methods": {"random": {"selector": "random"}},
        "refine": refining | more.pop("refine", {}),
        "budget": 20,
        "full": False,
        "train": {"tokens": 120, "batch_tokens": 60, "lora": {"r": 2, "target_modules": ["q_proj"]}},
        **more,
    }  # fmt: skip
    file = folder / "recipe.yaml"
    file.write_text(json.dumps(plan))
    return file


ENV = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def cli(*arguments, code=0, launch=(), env=ENV) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *launch, "-m", "llmselect", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=env)
    assert done.returncode == code, done.stderr
    return done


def states(run: Path) -> dict[str, bytes]:
    """All state files, answers and adapters, and the selection; not the seconds that training took."""
    found = [*(run / "refine").rglob("*"), *(run / "selections" / "iterative").rglob("*")]
    kept = [f for f in found if (f.is_file() and f.parent.name != "adapter") or f.suffix == ".safetensors"]
    return {str(f.relative_to(run)): f.read_bytes() for f in kept}


@pytest.mark.timeout(300)
def test_a_recipe_from_pool_to_table_with_scores_by_hand(tmp_path, model):
    recipe = plan_of(tmp_path, model)
    cli("run", recipe)
    run, here = Run(load_recipe(recipe)), tmp_path / "run" / "refine" / "seed-0"
    made = Selection.load(tmp_path / "run" / "selections" / "iterative" / "seed-0")
    assert np.bincount(made.evidence["round"]).tolist() == [0, 7, 7, 6] and len(set(made.indices.tolist())) == 20
    for number in (1, 2):
        at = here / f"round-{number}"
        asked, scores = (json.loads((at / f"{name}.json").read_text())["value"] for name in ("generate", "score"))
        loaded, fast = talker.load(model, at / "adapter"), AutoTokenizer.from_pretrained(model)
        so_far = made.indices[made.evidence["round"] <= number].tolist()
        assert 0 < len(asked["rows"]) <= 6 and set(asked["rows"]) <= set(so_far)
        for row, answer, score in zip(asked["rows"], asked["answers"], scores["scores"], strict=True):
            messages = run.pool[row]["messages"]
            greedy = talker.greedy(loaded, talker.prompt_ids(model, messages[:-1]), 8)
            assert answer == fast.decode(greedy, skip_special_tokens=True)
            by_hand = [nll_by_hand(loaded, fast, messages[:-1], text) for text in (messages[-1]["content"], answer)]
            assert score == pytest.approx(by_hand[0] - by_hand[1], abs=2e-4)
        trained = json.loads((at / "adapter" / "train.json").read_text())["provenance"]
        assert trained["rows"] == len(so_far)
    results = json.loads((tmp_path / "run" / "results.json").read_text())["rows"]
    assert [row["method"] for row in results] == ["base", "random", "iterative"] and results[2]["rows"] == 20
    told = json.loads(cli("refine", recipe, "--json").stdout)  # finds everything as it is
    assert told["seed-0"] == {"rows": 20, **made.provenance["report"]} and len(told["seed-0"]["rounds"]) == 3
    assert report_text(told).startswith("seed-0: 20 rows, 3 clusters\n")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_killed_run_of_real_models_ends_with_the_same_bytes(tmp_path, model):
    judge = save_judge(tmp_path / "judge")
    recipe = plan_of(tmp_path, model, refine={"scorer": "reward", "judge": str(judge), "rounds": 2})
    cli("refine", recipe, f"out={tmp_path / 'calm'}")
    hurt = tmp_path / "hurt"
    for awaited in ("select.json", "answers.jsonl"):  # killed in training, and between answers and scores
        child = subprocess.Popen([sys.executable, "-m", "llmselect", "refine", str(recipe), f"out={hurt}"], env=ENV,
                                 start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
        until = time.monotonic() + 90
        while not (hurt / "refine/seed-0/round-1" / awaited).exists() and child.poll() is None and time.monotonic() < until:
            time.sleep(0.005)
        assert child.poll() is None, "the run ended before it could be killed"
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    cli("refine", recipe, f"out={hurt}", env={**ENV, "OMP_NUM_THREADS": "1"})  # as many threads as before, all the same
    calm, hurt = states(tmp_path / "calm"), states(hurt)
    assert len(calm) > 8 and hurt == calm


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_processes_take_part(tmp_path, model):
    recipe = plan_of(tmp_path, model, refine={"rounds": 2})
    cli("refine", recipe, launch=("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"))
    made = Selection.load(tmp_path / "run" / "selections" / "iterative" / "seed-0")
    assert len(made) == 20 and made.provenance["report"]["rounds"][0]["scored"]


def test_a_dry_run_tells_rows_and_answers(tmp_path, model):
    recipe = plan_of(tmp_path, model)
    found = expected(load_recipe(recipe, ["seeds=[0,1]"]))
    assert [one["new_rows"] for one in found["rounds"]] == [7, 7, 6]
    assert [one["generations"] for one in found["rounds"]] == [6, 6, 0]
    assert found["trainings"] == 4 and found["generations"] == 24
    told = cli("refine", recipe, "--dry-run", "budget=50%").stdout
    assert "about 30 rows in 3 rounds" in told and "10 new rows, train on 10, at most 6 answers" in told
    assert "llmselect refine --dry-run tells them" in cli("run", recipe, "--dry-run").stdout
    assert not (tmp_path / "run").exists()


MISTAKES = [
    ("refine.x=rdss", r"refine\.x: no feature 'rdss'\. Did you mean 'rds'\?"),
    ("refine.quality=q", r"refine\.quality: no feature 'q'"),
    ("features.rds.lazy=true", r"refine\.x: all of it is read; give features\.rds lazy: false"),
    ("refine.rouns=2", r"refine\.rouns: unknown key\. Did you mean 'rounds'\?"),
    ("refine.rounds=0", r"refine: rounds: 0 must be at least 1"),
    ("refine.update=exq", r"refine\.update: expected .*one of exp, paper, softmax"),
    ("refine.scorer=reward", r"refine: judge: 'current' gives no rewards"),
    ("refine.judge=./nowhere", r"refine\.judge: \./nowhere is no folder"),
    ("refine.method=random", r"refine\.method: 'random' is also in methods"),
    ("refine.method=a/b", r"refine\.method\.a/b: not a name"),
    ("refine.max_new_tokens=200", r"refine\.max_new_tokens: 200 leaves no room"),
    ("refine.top_p=2", r"refine: top_p: 2"),
    ("refine.backend=hff", r"backend: no 'hff'"),
    ("refine.train.sft.learning_rat=1", r"learning_rat: SFTConfig has no such setting"),
    ("budget={tokens: 500}", r"budget: refine divides rows over rounds"),
]


@pytest.mark.parametrize(("override", "told"), MISTAKES, ids=[one[0] for one in MISTAKES])
def test_mistakes_are_told_before_anything_loads(tmp_path, model, override, told):
    recipe = plan_of(tmp_path, model)
    with pytest.raises(UsageError, match=told):
        load_recipe(recipe, [override])


def test_a_recipe_without_the_section_says_what_to_give(tmp_path, model):
    recipe = plan_of(tmp_path, model)
    assert "give one, e.g. refine.x=rds" in cli("refine", recipe, "refine=null", code=2).stderr
    load_recipe(recipe, ["methods={}"])
    with pytest.raises(UsageError, match="methods: at least one"):
        load_recipe(recipe, ["methods={}", "refine=null"])
