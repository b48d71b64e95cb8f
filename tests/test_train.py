"""Training: exact tokens and steps for every method, only responses learned, packing that changes nothing."""

from __future__ import annotations

import json

import numpy as np
import pytest
import rows
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

import tiny
from llmselect.chat import ChatEncoder, Encoded
from llmselect.errors import LlmselectError, UsageError
from llmselect.packing import bins, check_packing, packed, padded
from llmselect.token_steps import labels, schedule
from llmselect.train import Train, finetune, validate


def encoded(size: int) -> Encoded:
    return Encoded(np.arange(size + 2, dtype=np.int32), np.r_[False, False, np.ones(size, bool)], np.zeros(size + 2, np.int8))


@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(any), st.integers(1, 200), st.integers(1, 40), st.integers(0, 3)
)
def test_steps_hold_exactly_the_tokens_asked_for(sizes, tokens, batch, seed):
    plan = schedule(len(sizes), lambda i: [encoded(sizes[n]) for n in i], tokens, batch, seed)
    per_step = [sum(stop - start for _, start, stop in step) for step in plan.steps]
    assert sum(per_step) == plan.tokens == tokens
    assert len(plan.steps) == -(-tokens // batch) and all(n == batch for n in per_step[:-1])
    times = np.zeros(len(sizes))
    for row, start, stop in (segment for step in plan.steps for segment in step):
        times[plan.numbers[row]] += (stop - start) / max(1, sizes[plan.numbers[row]])
    seen = times[np.array(sizes) > 0]
    assert seen.max() - seen.min() <= 1 + 1e-9, "no row is ahead of another by more than one epoch"


def test_one_epoch_sees_every_token_once():
    sizes = [5, 0, 7, 3]
    plan = schedule(4, lambda i: [encoded(sizes[n]) for n in i], None, 4, 0)
    assert plan.tokens == 15 and [sum(b - a for _, a, b in step) for step in plan.steps] == [4, 4, 4, 3]


def test_rows_without_a_response_are_refused():
    with pytest.raises(LlmselectError, match="none of the selected rows"):
        schedule(2, lambda i: [encoded(0) for _ in i], 10, 5, 0)


def test_labels_are_the_supervised_tokens_of_the_range():
    row = ChatEncoder(tiny.tokenizer(), 200).encode([tiny.chats(5)[4]])[0]
    whole = labels(row, 0, int(row.response.sum()))
    np.testing.assert_array_equal(whole != -100, row.response)
    np.testing.assert_array_equal(whole[row.response], row.ids[row.response])
    assert (labels(row, 2, 5) != -100).sum() == 3


@given(st.lists(st.integers(1, 50), min_size=1, max_size=30))
def test_bins_hold_every_item_once_and_never_overflow(lengths):
    found = bins(lengths, 60)
    assert sorted(i for group in found for i in group) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in group) <= 60 for group in found)


def test_packed_loss_is_padded_loss():
    model = tiny.model()
    check_packing(model, 1)
    rows_ = ChatEncoder(tiny.tokenizer(), 200).encode(tiny.chats(9))
    items = [{"input_ids": r.ids.tolist(), "labels": labels(r, 0, 999).tolist()} for r in rows_]
    total = []
    for batch in (packed(1, 128)(items), padded(1)(items)):
        told = batch.pop("labels")
        logits = model(**batch, use_cache=False).logits[:, :-1].double()
        kept = told[:, 1:] != -100
        nll = -logits.log_softmax(-1).gather(-1, told[:, 1:].clamp_min(0)[..., None])[..., 0]
        total.append(nll[kept].sum().item())
    assert total[0] == pytest.approx(total[1], rel=1e-5)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train")
    model = str(tiny.save(folder / "model"))
    train = Train(tokens=400, batch_tokens=100, sft={"learning_rate": 1e-2})
    data = rows.pool(6)
    made = [
        finetune(data, model, folder / name, train, seed=seed, max_length=96) for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    return folder, model, train, data, made


def test_result_adapter_and_card(trained):
    folder, _, _, _, made = trained
    assert [(m.steps, m.tokens) for m in made] == [(4, 400)] * 3
    weights = [(folder / n / "adapter_model.safetensors").read_bytes() for n in "abc"]
    assert weights[0] == weights[1] != weights[2]
    card = (folder / "a" / "README.md").read_text()
    assert "base_model: model\n" in card and str(folder) not in card and "license" not in card


def test_training_lowers_the_loss_of_what_it_saw(trained):
    from llmselect.evaluate import row_losses

    folder, model, _, data, _ = trained
    before, after = (row_losses(model, a, {"t": data}, max_length=96)["t"].mean() for a in (None, str(folder / "a")))
    assert after < before - 0.2


def test_the_first_step_has_the_loss_of_the_formula(trained, tmp_path):
    _, model, _, data, _ = trained
    made = finetune(data, model, tmp_path / "one", Train(batch_tokens=10_000), seed=0, max_length=96)
    from llmselect.engine.backbone import Backbone

    backbone = Backbone(model, max_length=96)
    total = count = 0.0
    for row in backbone.encoder.encode(list(data["messages"])):
        at = np.flatnonzero(row.response)
        out = backbone.causal_lm(input_ids=torch.tensor(row.ids[None].astype(np.int64))).logits[0].double().log_softmax(-1)
        total -= out[at - 1, row.ids[at].astype(np.int64)].sum().item()
        count += len(at)
    assert made.tokens == count and made.train_loss == pytest.approx(total / count, rel=1e-4)
    weights = load_file(tmp_path / "one" / "adapter_model.safetensors")
    assert made.steps == 1 and all(value.any() for name, value in weights.items() if "lora_B" in name), "its one step learns"


def test_checkpoints_for_which_there_are_no_steps_are_told(trained, tmp_path, caplog):
    _, model, _, data, _ = trained
    finetune(data, model, tmp_path / "few", Train(tokens=300, batch_tokens=100, checkpoints=5), seed=0, max_length=96)
    assert "of 5 only 3 are kept" in caplog.text
    assert len(list((tmp_path / "few" / "checkpoints").iterdir())) == 3


def test_an_adapter_is_reused_or_refused_never_overwritten(trained):
    folder, model, train, data, made = trained
    stamp = (folder / "a" / "train.json").stat().st_mtime_ns
    assert finetune(data, model, folder / "a", train, seed=0, max_length=96) == made[0]
    assert (folder / "a" / "train.json").stat().st_mtime_ns == stamp
    with pytest.raises(LlmselectError, match=r"tokens: 400"):
        finetune(data, model, folder / "a", Train(tokens=500, batch_tokens=100), seed=0, max_length=96)
    assert json.loads((folder / "a" / "train.json").read_text())["key"]["train"]["tokens"] == 400


def test_a_diverging_run_saves_no_adapter(trained, tmp_path):
    _, model, _, data, _ = trained
    wild = Train(tokens=600, batch_tokens=100, sft={"learning_rate": 1e30, "max_grad_norm": 0.0, "logging_steps": 1})
    with pytest.raises(LlmselectError, match="training diverged"):
        finetune(data, model, tmp_path / "wild", wild, seed=0, max_length=96)
    assert not (tmp_path / "wild").exists()


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (Train(sft={"learning_rat": 1}), "Did you mean 'learning_rate'"),
        (Train(sft={"seed": 1}), "use seeds"),
        (Train(lora={"rr": 4}), "LoraConfig has"),
    ],
)
def test_settings_are_checked_by_name(train, message):
    with pytest.raises(UsageError, match=message):
        validate(train)
