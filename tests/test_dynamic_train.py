"""Training on a schedule: the rows seen, their weights in the loss, their losses, resuming, several processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

import tiny
from llmselect.dynamic.loss import row_sums
from llmselect.dynamic.sampler import EpochSampler
from llmselect.dynamic.schedules.infobatch import InfoBatch
from llmselect.dynamic.schedules.rs2 import Rs2
from llmselect.dynamic.schedules.seta import SeTa
from llmselect.dynamic.schedules.static import Static
from llmselect.dynamic.state import EpochState
from llmselect.dynamic.trainer import attach
from llmselect.errors import LlmselectError, UsageError
from llmselect.kernels.keyed import Keyed, keys_of
from llmselect.packing import padded

N, PAD = 11, 1
IDS = [f"row {i}" for i in range(N)]


def data():
    """Row i is told from the others by its second token; its prompt of two tokens has no labels."""
    from datasets import Dataset

    rng = np.random.default_rng(0)
    ids = [[2, 10 + i, *rng.integers(30, 90, 3 + i % 4).tolist()] for i in range(N)]
    return Dataset.from_dict({"id": IDS, "input_ids": ids, "labels": [[-100, -100, *one[2:]] for one in ids]})


def watch(model) -> list[list[tuple[int, float]]]:
    """Every forward pass in training as (row, its mean loss), worked out from the model's own inputs and outputs."""
    seen: list[list[tuple[int, float]]] = []

    def look(module, args, kwargs, out):
        if module.training:
            told = kwargs["input_ids"][:, 1:].clone()
            told[(told == PAD) | (torch.arange(told.shape[1]) < 1)] = -100
            nll = cross_entropy(out.logits[:, :-1].detach().transpose(1, 2), told, reduction="none")
            mean = nll.sum(1) / (told != -100).sum(1)
            seen.append([(int(i) - 10, float(x)) for i, x in zip(kwargs["input_ids"][:, 1], mean, strict=True)])

    model.register_forward_hook(look, with_kwargs=True)
    return seen


def trainer(folder, schedule, *, model=None, cls=None, **settings):
    from transformers import Trainer, TrainingArguments

    base = {"num_train_epochs": 8, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 1e-3,
            "use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1}  # fmt: skip
    args = TrainingArguments(output_dir=str(folder), **{**base, **settings})
    made = (cls or Trainer)(model=model or tiny.model(layers=1), args=args, train_dataset=data(), data_collator=padded(PAD))
    if schedule is not None:
        attach(made, schedule, seed=3)
    return made


SCHEDULES = [Rs2(5), Rs2(5, replacement=True), InfoBatch(), SeTa(groups=4, alpha=0.5), Static((0, 4, 8), (1.0, 2.0, 0.5))]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.name)
def test_training_sees_exactly_the_scheduled_rows(tmp_path, schedule):
    made = trainer(tmp_path, schedule)
    seen = watch(made.model)
    made.train()
    batches, losses = iter(seen), np.full(N, np.nan, np.float32)
    for epoch in range(8):
        expected = schedule.rows(epoch, 8, N, Keyed(3, keys_of(IDS, N)), losses)
        assert len(expected.indices) <= schedule.size(epoch, 8, N)
        found = [pair for _ in range(-(-len(expected.indices) // 2)) for pair in next(batches)]
        assert [row for row, _ in found] == expected.indices.tolist()
        for row, loss in found:
            losses[row] = loss
    assert next(batches, None) is None
    np.testing.assert_allclose(made.epoch_callback.epochs.losses, losses, rtol=1e-5)
    assert len(made.epoch_callback.history) == 8


def test_weights_enter_the_gradient(tmp_path):
    rows, weights = (0, 3, 5, 7), (1.0, 2.0, 0.5, 3.0)
    model = tiny.model(layers=1)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    total = tokens = 0
    for row, weight in zip(rows, weights, strict=True):
        ids = torch.tensor([data()[row]["input_ids"]])
        logits = model(input_ids=ids).logits[0]
        total = total + weight * -logits.log_softmax(-1)[range(1, ids.shape[1] - 1), ids[0, 2:]].sum()
        tokens += ids.shape[1] - 2
    (total / tokens).backward()
    gradient = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad()
    settings = {
        "optim": "sgd",
        "learning_rate": 1.0,
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
        "num_train_epochs": 1,
    }
    made = trainer(tmp_path, Static(rows, weights), model=model, **settings)
    out = made.train()
    assert out.global_step == 1 and out.training_loss == pytest.approx((total / tokens).item(), rel=1e-5)
    for name, p in model.named_parameters():
        torch.testing.assert_close(before[name] - p.detach(), gradient[name], atol=1e-6, rtol=1e-4)


def test_without_weights_it_is_the_trainers_own_loss(tmp_path):
    from transformers import Trainer

    made = trainer(tmp_path, Static(), num_train_epochs=2)
    made.train()
    orders = iter([order.tolist() for order, _ in made.epoch_callback.history])

    class Same(Trainer):
        def _get_train_sampler(self, train_dataset=None):
            return OrderedSampler()

    class OrderedSampler:
        def __iter__(self):
            return iter(next(orders))

        def __len__(self):
            return N

    plain = trainer(tmp_path, None, cls=Same, num_train_epochs=2)
    plain.train()
    assert plain.state.global_step == made.state.global_step == 6
    for a, b in zip(made.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    said = [
        [entry[key] for entry in t.state.log_history if key in entry] for t in (made, plain) for key in ("loss", "learning_rate")
    ]
    assert said[0] == pytest.approx(said[2], rel=1e-4) and said[1] == pytest.approx(said[3])


def test_row_sums_are_the_naive_ones():
    logits, labels = torch.randn(3, 5, 9), torch.tensor([[1, 2, 3, -100, -100], [-100] * 5, [-100, -100, -100, 4, 8]])
    sums, count = row_sums(logits, labels)
    p = logits.double().log_softmax(-1)
    expected = [-(p[0, 0, 2] + p[0, 1, 3]), torch.tensor(0.0), -(p[2, 2, 4] + p[2, 3, 8])]
    np.testing.assert_allclose(sums, [float(e) for e in expected], rtol=1e-5)
    assert count.tolist() == [2, 0, 2]


def test_the_learning_rate_follows_the_plan(tmp_path):
    made = trainer(tmp_path, InfoBatch(0.9), learning_rate=1.0, lr_scheduler_type="linear", max_grad_norm=0.0, optim="sgd")
    at: list[tuple[float, float]] = []
    step = type(made.epoch_callback).on_step_end

    def note(self, args, state, control, **kwargs):
        at.append((state.epoch, kwargs["optimizer"].param_groups[0]["lr"]))
        step(self, args, state, control, **kwargs)

    made.epoch_callback.on_step_end = note.__get__(made.epoch_callback)
    made.train()
    assert len(at) < 24 == made.state.max_steps  # 8 epochs of at most 3 steps
    for epoch in range(8):
        first = next(rate for e, rate in at if e > epoch)  # the rate that on_step_end sees is the next step's
        assert first == pytest.approx(1 - (3 * epoch + 1) / 24)


@pytest.mark.parametrize("schedule", [InfoBatch(), SeTa(groups=4, alpha=0.5), Rs2(7)], ids=lambda s: s.name)
def test_a_resumed_training_sees_the_same_rows(tmp_path, schedule):
    whole = trainer(tmp_path, schedule, save_strategy="steps", save_steps=1, num_train_epochs=4)
    seen = watch(whole.model)
    whole.train()
    steps = whole.state.global_step
    for stop in range(1, steps):
        again = trainer(tmp_path / "again", schedule, num_train_epochs=4)
        rest = watch(again.model)
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop}"))
        assert again.state.global_step == steps and 0 < len(rest) < len(seen)
        assert rest == seen[-len(rest) :]
    for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)
    state = json.loads((tmp_path / "checkpoint-1" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["EpochCallback"]["attributes"]["saved"]["epoch"] == 0


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    trainer(tmp_path, Rs2(5), save_strategy="steps", save_steps=1, max_steps=2).train()
    for schedule, settings, said in [
        (Rs2(6), {}, "made with another schedule or other rows"),
        (Rs2(5), {"per_device_train_batch_size": 1}, "steps of 4 rows, this training of 2"),
    ]:
        with pytest.raises(LlmselectError, match=said):
            trainer(tmp_path, schedule, **settings).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    trainer(tmp_path / "plain", None, save_strategy="steps", save_steps=1, max_steps=2).train()
    with pytest.raises(LlmselectError, match="made without a schedule"):
        trainer(tmp_path, Rs2(5)).train(resume_from_checkpoint=str(tmp_path / "plain" / "checkpoint-1"))


def test_max_steps_is_exact_and_a_second_training_starts_anew(tmp_path):
    made = trainer(tmp_path, Rs2(5), max_steps=7)  # epochs of 2 steps
    assert made.train().global_step == 7 and len(made.epoch_callback.history) == 4
    first = made.epoch_callback.history[0][0].tolist()
    assert made.train().global_step == 7 and made.epoch_callback.history[0][0].tolist() == first


def test_settings_that_do_not_go_with_a_schedule(tmp_path):
    for schedule, settings, said in [
        (InfoBatch(), {"max_steps": 5}, "give num_train_epochs"),
        (Rs2(5), {"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1 does not go with a schedule"),
        (Rs2(5), {"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy"),
    ]:
        with pytest.raises(UsageError, match=said):
            trainer(tmp_path, schedule, **settings)
    made = trainer(tmp_path, Rs2(5))
    with pytest.raises(UsageError, match="follows a schedule already"):
        attach(made, Rs2(5))
    with pytest.raises(UsageError, match="disagree"):
        attach(trainer(tmp_path, None), Rs2(5), ids=["a"])


def test_sft_trainer_follows_a_schedule(tmp_path):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    fast = tiny.tokenizer()
    chats = Dataset.from_dict({"id": IDS, "messages": tiny.chats(N)})
    args = SFTConfig(output_dir=str(tmp_path), num_train_epochs=3, per_device_train_batch_size=2, use_cpu=True, bf16=False,
                     report_to="none", save_strategy="no", disable_tqdm=True, assistant_only_loss=True, eval_strategy="epoch",
                     gradient_checkpointing=False)  # fmt: skip
    made = SFTTrainer(model=tiny.model(layers=1, vocab=len(fast)), args=args, train_dataset=chats, processing_class=fast,
                      eval_dataset=chats.select(range(2)))  # fmt: skip
    plain = [dict(row) for row in made.train_dataset]
    callback = attach(made, InfoBatch(0.9), ids=IDS)
    seen: list[list[int]] = []
    made.model.register_forward_pre_hook(
        lambda module, _, kwargs: seen.extend(kwargs["input_ids"].tolist()) if module.training else None, with_kwargs=True
    )
    made.train()
    rows = [int(i) for indices, _ in callback.history for i in indices]
    assert len(rows) == len(seen) < 3 * N and len(callback.history) == 3
    for row, ids in zip(rows, seen, strict=True):
        assert ids[: len(plain[row]["input_ids"])] == plain[row]["input_ids"]
    assert np.isfinite(callback.epochs.losses).all() and any("eval_loss" in entry for entry in made.state.log_history)


def test_packed_rows_are_refused(tmp_path):
    made = trainer(tmp_path, None)
    made.data_collator = lambda items: {"input_ids": torch.ones(1, 9), "labels": torch.ones(1, 9)}
    attach(made, Rs2(5))
    with pytest.raises(LlmselectError, match="one line of labels for each of the batch's 2 rows"):
        made.train()


def test_the_sampler_alone_gives_plain_rows():
    from torch.utils.data import DataLoader

    state = EpochState(Rs2(5), epochs=3, ids=IDS, seed=2)
    sampler = EpochSampler(state)
    expected = Rs2(5).materialise(3, ids=IDS, seed=2)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        read = torch.cat(list(DataLoader(range(N), batch_size=2, sampler=sampler)))
        assert read.tolist() == expected[epoch].indices.tolist() and len(sampler) == 5


# Plain gradient descent: Adam would not notice a gradient of twice the size.
PLAIN = {"num_train_epochs": 4, "gradient_accumulation_steps": 1, "optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0}
SCRIPT = """
import json, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_dynamic_train as t
out = Path(sys.argv[1])
made = t.trainer(out / "run", t.InfoBatch(), ddp_find_unused_parameters=False, **t.PLAIN)
seen = t.watch(made.model)
made.train()
rank = made.args.process_index
told = [made.epoch_callback.history, made.epoch_callback.epochs.losses]
(out / f"{{rank}}.json").write_text(json.dumps({{
    "seen": [[row for row, _ in batch] for batch in seen], "world": made.args.world_size, "steps": made.state.global_step,
    "history": [indices.tolist() for indices, _ in told[0]], "losses": told[1].tolist(),
    "sum": [float(p.double().abs().sum()) for p in made.model.parameters()]}}))
"""


@pytest.mark.slow
def test_two_processes_share_the_schedule(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent)), "utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first["world"] == 2
    for key in ("history", "losses", "sum", "steps"):
        assert first[key] == second[key]
    alone = trainer(tmp_path / "alone", InfoBatch(), **{**PLAIN, "per_device_train_batch_size": 4})
    alone.train()
    # The same batches of four rows, so the same training: rows that fill up the last batch count for nothing.
    assert first["history"] == [indices.tolist() for indices, _ in alone.epoch_callback.history]
    assert first["steps"] == alone.state.global_step
    np.testing.assert_allclose(first["losses"], alone.epoch_callback.epochs.losses, rtol=1e-4)
    np.testing.assert_allclose(
        first["sum"], [p.detach().double().abs().sum().item() for p in alone.model.parameters()], rtol=1e-5
    )
    at = 0
    for rows in first["history"]:
        batches = -(-len(rows) // 4)
        joined = [row for b in range(at, at + batches) for one in (first, second) for row in one["seen"][b]]
        assert joined[: len(rows)] == rows and len(joined) == 4 * batches
        at += batches
    assert at == len(first["seen"]) == len(second["seen"])
