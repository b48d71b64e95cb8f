"""Fine-tuning under wrong settings, faults and repetition; the files it leaves."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml

import tiny
from llmselect import token_batches, train
from llmselect.chat import ChatEncoder
from llmselect.errors import LlmselectError, MissingExtra, UsageError
from llmselect.token_steps import schedule
from llmselect.train import Train, finetune, validate

LONG = 256
QUIET = {"max_grad_norm": 0.0, "lr_scheduler_type": "constant", "warmup_steps": 0}


def rows_of(chats):
    from datasets import Dataset

    ids = [f"{i:032x}" for i in range(len(chats))]
    return Dataset.from_dict({"id": ids, "messages": chats, "source": ["test"] * len(chats)})


@pytest.fixture(scope="module")
def rows():
    return rows_of(tiny.chats(40))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (
            {"sft": {"learning_rte": 1}},
            "train.sft.learning_rte: SFTConfig has no such setting. Did you mean 'learning_rate'?",
        ),
        ({"lora": {"rank": 8}}, "train.lora.rank: LoraConfig has no such setting"),
        ({"sft": {"max_steps": 9}}, "train.sft.max_steps: llmselect sets this itself; use train.tokens"),
        ({"sft": {"gradient_accumulation_steps": 2}}, "use train.micro_tokens"),
        ({"sft": {"seed": 1}}, "use seeds"),
        ({"sft": {"lr_scheduler_type": "cosin"}}, "train.sft: cosin is not a valid SchedulerType"),
        ({"sft": {"learning_rate": "fast"}}, "train.sft: could not convert string to float: 'fast'"),
    ],
)
def test_settings_are_checked_before_anything_loads(rows, tmp_path, settings, told):
    with pytest.raises(UsageError) as error:
        finetune(rows, "/no/such/model", tmp_path / "a", Train(**settings), seed=0)
    assert told in str(error.value)
    assert not (tmp_path / "a").exists()


def test_settings_that_do_not_fit_the_model_are_wrong_usage(tiny_model, rows, tmp_path):
    for lora, told in (
        ({"r": 0}, "train: `r` should be a positive"),
        ({"target_modules": ["lm_head"]}, "train: .*lm_head"),
    ):
        with pytest.raises(UsageError, match=told):
            finetune(rows, str(tiny_model), tmp_path / "a", Train(tokens=60, lora=lora), seed=0, max_length=LONG)


@pytest.mark.parametrize("key", sorted(train.OWNED))
def test_every_owned_key_is_one_of_trl(key):
    from dataclasses import fields

    from trl import SFTConfig

    assert key in {f.name for f in fields(SFTConfig)}
    with pytest.raises(UsageError, match="llmselect sets this itself"):
        validate(Train(sft={key: 1}))


def test_both_names_of_checkpointing_work():
    for name in ("gradient_checkpointing", "activation_checkpointing"):
        assert train._sft(Train(sft={name: True}), output_dir="unused").gradient_checkpointing is True
    assert train._sft(Train(), output_dir="unused").gradient_checkpointing is False
    assert train._sft(Train(sft={"learning_rate": "1e-3"}), output_dir="unused").learning_rate == 1e-3


def test_without_trl_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(MissingExtra, match=r"pip install 'llmselect\[train\]'"):
        validate(Train())


@pytest.mark.parametrize("name", ["tokens", "batch_tokens", "micro_tokens", "max_length"])
def test_counts_are_at_least_one(name):
    with pytest.raises(UsageError, match=f"{name}: 0 must be at least 1"):
        Train(**{name: 0})


def test_a_finished_adapter_is_not_trained_again(tiny_model, rows, tmp_path, monkeypatch):
    out, config = tmp_path / "a", Train(tokens=60)
    first = finetune(rows, str(tiny_model), out, config, seed=0, max_length=LONG)
    monkeypatch.setattr(train, "_trainer", None)  # training again would call it
    assert finetune(rows, str(tiny_model), out, config, seed=0, max_length=LONG) == first
    with pytest.raises(LlmselectError, match=r"train\.tokens: 60 (→|->) 61[\s\S]*Delete it, or give the run another out="):
        finetune(rows, str(tiny_model), out, Train(tokens=61), seed=0, max_length=LONG)
    with pytest.raises(LlmselectError, match="rows: "):
        finetune(rows.select(range(39)), str(tiny_model), out, config, seed=0, max_length=LONG)
    with pytest.raises(LlmselectError, match=r"seed: 0 (→|->) 1"):
        finetune(rows, str(tiny_model), out, config, seed=1, max_length=LONG)
    flipped = bytearray((out / "adapter_model.safetensors").read_bytes())
    flipped[-1] ^= 1
    (out / "adapter_model.safetensors").write_bytes(flipped)
    with pytest.raises(LlmselectError, match=r"adapter_model\.safetensors is damaged or missing; delete"):
        finetune(rows, str(tiny_model), out, config, seed=0, max_length=LONG)


def test_other_weights_in_the_same_folder_are_another_model(tiny_model, rows, tmp_path):
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    finetune(rows, str(folder), tmp_path / "a", Train(tokens=60), seed=0, max_length=LONG)
    tiny.save(folder, seed=1)
    with pytest.raises(LlmselectError, match="weights: "):
        finetune(rows, str(folder), tmp_path / "a", Train(tokens=60), seed=0, max_length=LONG)


def test_a_folder_of_other_files_is_left_alone(tiny_model, rows, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(LlmselectError, match="no adapter of llmselect; give another out="):
        finetune(rows, str(tiny_model), tmp_path, Train(tokens=60), seed=0, max_length=LONG)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_row_without_supervised_tokens_is_named(tiny_model, tmp_path):
    chats = [*tiny.chats(3), [{"role": "user", "content": "anyone there?"}]]
    with pytest.raises(LlmselectError, match=f"1 rows have no supervised token within max_length={LONG}: {3:032x}"):
        finetune(rows_of(chats), str(tiny_model), tmp_path / "a", Train(), seed=0, max_length=LONG)
    assert not (tmp_path / "a").exists()


def test_a_loss_that_is_not_finite_names_step_and_row(tiny_model, tmp_path):
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    encoder, broken = ChatEncoder(tiny.tokenizer(), LONG), tiny.model(vocab=len(tiny.tokenizer()))
    mark = encoder.tokenizer.convert_tokens_to_ids("~")
    with torch.no_grad():
        broken.get_input_embeddings().weight[mark] = float("nan")
    broken.save_pretrained(folder)
    chats = [*tiny.chats(30), [{"role": "user", "content": "~"}, {"role": "assistant", "content": "seven"}]]
    everything = rows_of(chats)
    plan = schedule(31, lambda i: encoder.encode(everything[list(i)]["messages"]) if i else [], None, 60, 0)
    at = next(s for s, step in enumerate(plan.steps) if any(plan.numbers[p] == 30 for p, _, _ in step))
    assert 0 < at < len(plan.steps) - 1
    config = Train(batch_tokens=60, packing=False, micro_tokens=100)
    with pytest.raises(LlmselectError) as error:
        finetune(everything, str(folder), tmp_path / "a", config, seed=0, max_length=LONG)
    assert f"the loss of step {at + 1} of {len(plan.steps)} is not finite" in str(error.value)
    assert f"{30:032x}" in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("tokens", [100, 200])
def test_weights_that_are_not_finite_are_never_saved(tiny_model, rows, tmp_path, tokens):
    # Weights of about 0.1 lose 10⁵⁹ in the first update, while the loss of that step is still finite.
    sft = {**QUIET, "optim": "sgd", "learning_rate": 1e30, "weight_decay": 1e30}
    with pytest.raises(LlmselectError, match=rf"the update of step 1 of {tokens // 100} is not finite .*no adapter was saved"):
        finetune(
            rows,
            str(tiny_model),
            tmp_path / "a",
            Train(tokens=tokens, batch_tokens=100, sft=sft),
            seed=0,
            max_length=LONG,
        )
    assert not (tmp_path / "a").exists()


def test_out_of_memory_says_what_to_type(tiny_model, rows, tmp_path, monkeypatch):
    def full(self, number):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(token_batches.MicroBatches, "__getitem__", full)
    with pytest.raises(LlmselectError, match=r"micro-batches of 500 tokens; type train\.micro_tokens=250"):
        finetune(rows, str(tiny_model), tmp_path / "a", Train(tokens=60, micro_tokens=500), seed=0, max_length=LONG)


def test_the_card_tells_what_was_done_and_not_where(tiny_model, rows, tmp_path):
    about = {"method": "a|b`<script>", "budget": "5%", "pool": str(tmp_path)}
    config = Train(tokens=60, lora={"r": 4})
    found = finetune(rows, str(tiny_model), tmp_path / "a", config, seed=7, max_length=LONG, provenance=about)
    text = (tmp_path / "a" / "README.md").read_text("utf-8")
    head = yaml.safe_load(text.split("---\n")[1])
    assert head == {"base_model": tiny_model.name, "library_name": "peft", "tags": ["llmselect", "lora", "sft"]}
    table = [line.split("|") for line in text.splitlines() if line.startswith("| ")][1:]
    assert all(len(cells) == 4 for cells in table)
    told = {cells[1].strip(): cells[2].strip() for cells in table}
    assert told["supervised tokens"] == "`60`" and told["seed"] == "`7`" and told["rows"] == "`40`" and told["steps"] == "`1`"
    assert '"r": 4' in told["LoRA"] and '"learning_rate": 0.0002' in told["SFT"] and '"trl"' in told["versions"]
    assert "<script>" not in text and str(tmp_path) not in text and str(tiny_model.parent) not in text
    stored = json.loads((tmp_path / "a" / "train.json").read_text())
    assert stored["result"]["tokens"] == 60 and stored["result"]["train_loss"] == found.train_loss
    assert stored["key"]["train"]["lora"] == {"r": 4} and stored["provenance"] == {**about, "rows": 40}
