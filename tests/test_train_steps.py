"""Fine-tuning at equal tokens, against loops written from the formula: loss, gradients, counts, faults."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tiny
from llmselect import token_batches, train
from llmselect.chat import ChatEncoder
from llmselect.packing import packed, padded
from llmselect.token_batches import MicroBatches, accumulation, spread
from llmselect.token_steps import schedule
from llmselect.train import Train, finetune

LONG = 256
QUIET = {"max_grad_norm": 0.0, "lr_scheduler_type": "constant", "warmup_steps": 0}


def rows_of(chats):
    from datasets import Dataset

    ids = [f"{i:032x}" for i in range(len(chats))]
    return Dataset.from_dict({"id": ids, "messages": chats, "source": ["test"] * len(chats)})


@pytest.fixture(scope="module")
def rows():
    return rows_of(tiny.chats(40))


@pytest.fixture(scope="module")
def encoder():
    return ChatEncoder(tiny.tokenizer(), LONG)


def planned(rows, encoder, tokens, batch_tokens, seed=0):
    return schedule(len(rows), lambda i: encoder.encode(rows[list(i)]["messages"]) if i else [], tokens, batch_tokens, seed)


def log_probs(model, row):
    """log p of each token of a row, given what precedes it, [T − 1]."""
    ids = torch.as_tensor(row.ids, dtype=torch.long)
    logits = model(input_ids=ids[None]).logits[0, :-1]
    return logits.log_softmax(-1)[torch.arange(len(ids) - 1), ids[1:]]


def naive_loss(model, plan, step, kind="nll"):
    """Mean over the step's supervised tokens, one row at a time."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for place, start, stop in plan.steps[step]:
        row = plan.rows[place]
        at = np.flatnonzero(row.response)[start:stop] - 1
        told = log_probs(model, row)[at]
        total = total - (told * told.exp().detach() if kind == "dft" else told).sum()
        count += len(at)
    return total / count


def double(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)


def weights(folder):
    from safetensors.torch import load_file

    return load_file(Path(folder) / "adapter_model.safetensors")


LAYOUTS = [
    pytest.param({"packing": False, "micro_tokens": 10**6}, "nll", id="one-padded-batch"),
    pytest.param({"packing": False, "micro_tokens": 150}, "nll", id="padded-micro-batches"),
    pytest.param({"packing": True, "micro_tokens": 10**6}, "nll", id="packed"),
    pytest.param({"packing": True, "micro_tokens": 400}, "nll", id="packed-micro-batches"),
    pytest.param({"packing": False, "micro_tokens": 150}, "dft", id="loss-of-trl"),
]


@pytest.mark.parametrize(("layout", "kind"), LAYOUTS)
def test_a_step_is_the_mean_over_its_supervised_tokens(tiny_model, rows, encoder, tmp_path, layout, kind):
    from peft import get_peft_model, set_peft_model_state_dict

    config = Train(tokens=200, batch_tokens=200, sft={**QUIET, "optim": "sgd", "learning_rate": 0.5, "loss_type": kind}, **layout)
    found = finetune(rows, str(tiny_model), tmp_path / "a", config, seed=3, max_length=LONG)
    plan = planned(rows, encoder, 200, 200, 3)
    oracle = get_peft_model(double(tiny_model), train._lora(config)).double()
    saved = weights(tmp_path / "a")
    first = {k: v if "lora_A" in k else torch.zeros_like(v) for k, v in saved.items()}  # B = 0, so A has no gradient yet
    set_peft_model_state_dict(oracle, {k: v.double() for k, v in first.items()})
    loss = naive_loss(oracle, plan, 0, kind)
    loss.backward()
    assert found.train_loss == pytest.approx(loss.item(), rel=1e-5)
    moved = {n.replace(".default", ""): -0.5 * p.grad for n, p in oracle.named_parameters() if "lora_B" in n}
    assert len(moved) == 21  # 7 linear maps in each of 3 blocks
    for name, expected in moved.items():
        torch.testing.assert_close(saved[name].double(), expected, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("packing", [False, True])
def test_batches_of_all_processes_are_the_plan(rows, encoder, processes, packing):
    plan = planned(rows, encoder, 1000, 128)
    count = accumulation(plan, 150, processes, packing)
    assert count > 1
    collate = packed(1, LONG) if packing else padded(1)
    shares = [MicroBatches(plan, collate, count, processes, rank, packing) for rank in range(processes)]
    assert {len(share) for share in shares} == {len(plan.steps) * count}
    for step, expected in enumerate(plan.steps):
        numbers = range(step * count, (step + 1) * count)
        segments = [s for share in shares for n in numbers for s in share.segments(n) if s[2] > s[1]]
        assert sorted(segments) == sorted(expected)
        batches = [share[n] for share in shares for n in numbers]
        supervised = sum(int((b["labels"][:, 1:] != -100).sum()) for b in batches)
        assert supervised == (128 if step < 7 else 1000 - 7 * 128)
        if not packing:
            assert all(b["labels"].numel() <= 150 or len(b["labels"]) == 1 for b in batches)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=7), st.integers(1, 4))
def test_padded_pieces_are_as_cheap_as_neighbours_in_length_allow(lengths, count):
    pieces = spread(lengths, count, packing=False)
    assert len(pieces) == count
    assert sorted(i for piece in pieces for i in piece) == list(range(len(lengths)))
    dearest = max(len(piece) * max(lengths[i] for i in piece) for piece in pieces if piece)
    order, n = sorted(lengths, reverse=True), len(lengths)
    cuts = [c for k in range(count) for c in itertools.combinations(range(1, n), k)]
    bounds = [[0, *c, n] for c in cuts]
    assert dearest == min(max((b - a) * order[a] for a, b in itertools.pairwise(bound)) for bound in bounds)


def seen_batches(monkeypatch):
    batches, plain = [], MicroBatches.__getitem__

    def spy(self, number):
        batches.append(plain(self, number))
        return batches[-1]

    monkeypatch.setattr(token_batches.MicroBatches, "__getitem__", spy)
    return batches


def test_methods_of_any_row_length_get_the_same_tokens_and_steps(tiny_model, tmp_path, monkeypatch):
    short = rows_of([[{"role": "user", "content": f"{i}"}, {"role": "assistant", "content": "Bonjour."}] for i in range(30)])
    long = rows_of(
        [[{"role": "user", "content": f"{i}"}, {"role": "assistant", "content": tiny.TEXTS[i % 4] * 2}] for i in range(30)]
    )
    told = []
    for name, selection in (("short", short), ("long", long)):
        batches = seen_batches(monkeypatch)
        found = finetune(
            selection, str(tiny_model), tmp_path / name, Train(tokens=330, batch_tokens=100), seed=0, max_length=LONG
        )
        told.append((found.tokens, found.steps, sum(int((b["labels"] != -100).sum()) for b in batches)))
        monkeypatch.undo()
    assert told == [(330, 4, 330)] * 2


def test_only_responses_are_learned_and_every_epoch_has_every_row(tiny_model, rows, encoder, tmp_path, monkeypatch, capsys):
    few = rows.select(range(9))
    encoded = encoder.encode(few["messages"])
    supervised = sum(int(row.response.sum()) for row in encoded)
    batches = seen_batches(monkeypatch)
    config = Train(tokens=2 * supervised, batch_tokens=64, packing=False)
    found = finetune(few, str(tiny_model), tmp_path / "a", config, seed=1, max_length=LONG)
    assert (found.tokens, found.epochs, found.steps) == (2 * supervised, 2.0, math.ceil(2 * supervised / 64))
    by_ids = {tuple(row.ids.tolist()): row for row in encoded}
    learned = {ids: np.zeros(len(ids), int) for ids in by_ids}
    for batch in batches:
        for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
            key = tuple(ids[mask.bool()].tolist())
            told = labels[: len(key)]
            assert (labels[len(key) :] == -100).all()
            assert all(told[i] in (-100, key[i]) for i in range(len(key)))
            learned[key] += (told != -100).numpy()
    for ids, times in learned.items():
        assert times.tolist() == (2 * by_ids[ids].response).tolist()
    assert capsys.readouterr().out == ""


def test_one_epoch_is_the_default(tiny_model, rows, encoder, tmp_path):
    few = rows.select(range(5))
    found = finetune(few, str(tiny_model), tmp_path / "a", Train(), seed=0, max_length=LONG)
    assert found.tokens == sum(int(row.response.sum()) for row in encoder.encode(few["messages"]))
    assert (found.epochs, found.steps) == (1.0, 1)


def test_over_training_learns_the_rows(tiny_model, rows, encoder, tmp_path):
    from peft import PeftModel

    few = rows.select(range(4))
    config = Train(tokens=6000, batch_tokens=150, sft={"learning_rate": "2e-2"}, lora={"r": 8})
    finetune(few, str(tiny_model), tmp_path / "a", config, seed=0, max_length=LONG)
    plan = planned(few, encoder, None, 10**6)
    base = double(tiny_model)
    before = naive_loss(base, plan, 0).item()
    after = naive_loss(PeftModel.from_pretrained(base, tmp_path / "a").double(), plan, 0).item()
    assert after < 0.3 * before


def test_a_seed_decides_every_byte(tiny_model, rows, tmp_path):
    config = Train(tokens=300, batch_tokens=100, lora={"lora_dropout": 0.1})
    made = []
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        torch.manual_seed(len(made))
        finetune(rows, str(tiny_model), tmp_path / name, config, seed=seed, max_length=LONG)
        made.append(
            {f: (tmp_path / name / f).read_bytes() for f in ("adapter_model.safetensors", "adapter_config.json", "README.md")}
        )
    assert made[0] == made[1]
    assert made[0]["adapter_model.safetensors"] != made[2]["adapter_model.safetensors"]
    modules = json.loads(made[0]["adapter_config.json"])["target_modules"]
    assert modules == sorted(modules)


PROCESS = """
import os
import sys
from pathlib import Path
from datasets import Dataset
from llmselect.train import Train, finetune
model, data, out = sys.argv[1:]
config = Train(tokens=400, batch_tokens=90, micro_tokens=200)
found = finetune(Dataset.from_json(data), model, Path(out), config, seed=2, max_length=256, device="cpu")
Path(out).with_name(f"rank-{os.environ['RANK']}").write_text(repr(found.train_loss))  # both ranks share one stdout
"""


def test_two_processes_train_the_same_adapter(tiny_model, rows, tmp_path):
    config = Train(tokens=400, batch_tokens=90, micro_tokens=200)
    alone = finetune(rows, str(tiny_model), tmp_path / "one", config, seed=2, max_length=LONG, device="cpu")
    (tmp_path / "process.py").write_text(PROCESS)
    rows.to_json(tmp_path / "rows.jsonl")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, tmp_path / "process.py", tiny_model, tmp_path / "rows.jsonl", tmp_path / "two"]
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    ran = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=250,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    together = json.loads((tmp_path / "two" / "train.json").read_text())["result"]
    assert (together["tokens"], together["steps"]) == (alone.tokens, alone.steps) == (400, 5)
    assert [float((tmp_path / f"rank-{r}").read_text()) for r in (0, 1)] == [together["train_loss"]] * 2
    assert together["train_loss"] == pytest.approx(alone.train_loss, rel=1e-5)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-4)
