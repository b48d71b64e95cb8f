"""A Trainer that follows a schedule."""

from __future__ import annotations

# datasets has no types.
# pyright: reportMissingTypeStubs=false
from math import ceil
from typing import Any

from llmselect.dynamic.callback import EpochCallback
from llmselect.dynamic.loss import row_sums, weighted_loss
from llmselect.dynamic.sampler import ROW, WEIGHT, EpochSampler, Weighted, WeightedCollator
from llmselect.dynamic.schedules._base import EpochSchedule
from llmselect.dynamic.state import EpochState
from llmselect.errors import LlmselectError, UsageError
from llmselect.plain import is_mapping


def attach(trainer: Any, schedule: EpochSchedule, *, ids: Any = None, seed: int | None = None,
           losses: Any = None) -> EpochCallback:  # fmt: skip
    """Make `trainer`, a transformers `Trainer` or a subclass such as TRL's `SFTTrainer`, train on the rows of `schedule`.

    Epoch e of the training sees exactly the rows of epoch e of the schedule, shared out between the processes. The loss
    of a step is Σᵢ wᵢ Σₜ −log p(yᵢₜ) / N over its rows i and their supervised tokens t, N their number without weights:
    with weights of 1 it is Trainer's own. The losses of rows come from the same forward pass. A checkpoint holds losses
    and epoch, so that a resumed training sees the rows it would have seen. The learning rate is planned for
    `schedule.size` rows an epoch and follows this plan where a schedule leaves out more.

    The token trainer of `llmselect train` plans all steps, of equal supervised tokens, before it starts: it can follow a
    schedule whose rows are known by then and whose weights are 1 (`rs2`, `static` without weights), with the setting
    `train.schedule`. Rows that depend on losses would make the number of tokens depend on the training; this is the way.

    Args:
        trainer: before `train()`; rows must be padded, not packed, and labels be `[rows, tokens]`.
        ids: of the training rows, in their order; None takes the column `id` of `trainer.train_dataset`, else row numbers.
        seed: of the schedule; None takes the Trainer's `data_seed`, else its `seed`.
        losses: `[n]` to begin with, NaN where unknown.

    Returns:
        The callback, whose `epochs.losses` and `history` say what happened.

    Errors: `UsageError` for settings that do not go with a schedule.
    """
    args, data = trainer.args, trainer.train_dataset
    _check(trainer, schedule)
    if ids is None and "id" in (getattr(data, "column_names", None) or ()):
        ids = list(data["id"])
    if seed is None:
        seed = int(args.seed if args.data_seed is None else args.data_seed)
    epochs = _epochs(schedule, trainer, len(data)) if args.max_steps > 0 else ceil(args.num_train_epochs)
    callback = EpochCallback(EpochState(schedule, epochs=epochs, n=len(data), ids=ids, seed=seed, losses=losses))
    kind: type[Any] = trainer.__class__
    trainer.__class__ = type(f"Scheduled{kind.__name__}", (_Scheduled, kind), {})
    trainer.epoch_callback = callback
    trainer.add_callback(callback)
    return callback


def _check(trainer: Any, schedule: EpochSchedule) -> None:
    args = trainer.args
    if missing := [name for name in ("_run_epoch", "_init_training_state", "_get_train_sampler") if not hasattr(trainer, name)]:
        raise LlmselectError(f"this version of transformers has no Trainer.{missing[0]}; type: pip install -U transformers")
    if isinstance(trainer, _Scheduled):
        raise UsageError("this trainer follows a schedule already; make a new one")
    if not hasattr(trainer.train_dataset, "__len__") or not hasattr(trainer.train_dataset, "__getitem__"):
        raise UsageError("train_dataset: a schedule needs a dataset with a length and rows by number, not a stream")
    if args.n_gpu > 1:
        raise UsageError(f"{args.n_gpu} GPUs in one process; type accelerate launch, or CUDA_VISIBLE_DEVICES=0")
    given = {
        "packing": getattr(args, "packing", False), "padding_free": getattr(args, "padding_free", False),
        "label_smoothing_factor": args.label_smoothing_factor, "use_liger_kernel": args.use_liger_kernel,
        "compute_loss_func": trainer.compute_loss_func, "loss_type": getattr(args, "loss_type", "nll") not in ("nll", None),
        "train_sampling_strategy": getattr(args, "train_sampling_strategy", "random") != "random",
        "router_aux_loss_coef": getattr(trainer, "aux_loss_enabled", False),
    }  # fmt: skip
    if wrong := [name for name, value in given.items() if value]:
        raise UsageError(f"{wrong[0]}={getattr(args, wrong[0], True)!r} does not go with a schedule, which decides the order "
                         "of rows and needs their losses one by one; leave it at its default")  # fmt: skip
    if args.max_steps > 0 and schedule.needs_losses:
        raise UsageError(f"max_steps={args.max_steps}: how many steps an epoch of '{schedule.name}' has depends on losses; "
                         "give num_train_epochs")  # fmt: skip


def _steps(trainer: Any, rows: int) -> int:
    """Optimizer steps of an epoch of so many rows."""
    args, size = trainer.args, trainer._train_batch_size * trainer.args.world_size
    batches = rows // size if args.dataloader_drop_last else -(-rows // size)
    return max(1, -(-batches // args.gradient_accumulation_steps))


def _epochs(schedule: EpochSchedule, trainer: Any, n: int) -> int:
    """Epochs that `max_steps` steps take."""
    epochs = 1
    while sum(_steps(trainer, schedule.size(e, epochs, n)) for e in range(epochs)) < trainer.args.max_steps:
        epochs += 1
    return epochs


class _Scheduled:
    """What is not the Trainer's own: rows by the schedule, weights in the loss, epochs of different length."""

    epoch_callback: EpochCallback
    args: Any
    state: Any
    accelerator: Any
    train_dataset: Any
    data_collator: Any
    model_accepts_loss_kwargs: bool
    _train_batch_size: int

    @property
    def _epochs(self) -> EpochState:
        assert self.epoch_callback.epochs is not None
        return self.epoch_callback.epochs

    def get_train_dataloader(self) -> Any:
        """The Trainer's own loader, of rows that carry number and weight."""
        from datasets import Dataset

        trainer: Any = super()
        me: Any = self
        data, collate = self.train_dataset, self.data_collator
        if isinstance(data, Dataset):
            visible, inner = me._remove_unused_columns(data, "Training"), collate
        else:
            visible, inner = data, me._get_collator_with_removed_columns(collate, "Training")
        try:
            self.train_dataset, self.data_collator = Weighted(visible), WeightedCollator(inner)
            return trainer.get_train_dataloader()
        finally:
            self.train_dataset, self.data_collator = data, collate

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochSampler:
        size = self._train_batch_size * self.args.world_size
        whole = self.args.world_size > 1 and not self.args.dataloader_drop_last
        return EpochSampler(self._epochs, weighted=True, multiple=size if whole else 1)

    def set_initial_training_values(self, args: Any, dataloader: Any) -> tuple[int, ...]:
        """Trainer's numbers, its steps summed over epochs of different length."""
        me: Any = self
        epochs = self._epochs
        sizes = [epochs.schedule.size(e, epochs.epochs, epochs.n) for e in range(epochs.epochs)]
        steps = [_steps(self, size) for size in sizes]
        self.epoch_callback.planned = [sum(steps[:e]) for e in range(epochs.epochs)]
        total = me.get_total_train_batch_size(args)
        self.epoch_callback.rows_per_step = total
        part = args.num_train_epochs % 1 or 1
        most = args.max_steps if args.max_steps > 0 else sum(steps[:-1]) + ceil(part * steps[-1])
        return epochs.epochs, steps[0], sizes[0], sum(sizes), total, steps[0] * args.gradient_accumulation_steps, most

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        trainer: Any = super()
        me: Any = self
        callback = self.epoch_callback
        callback.reset()
        resuming = trainer._init_training_state(*args, **kwargs)
        if not any(one is callback for one in me.callback_handler.callbacks):
            me.remove_callback(EpochCallback)
            me.add_callback(callback)
        if not self.state.global_step:
            return resuming
        found = self.state.stateful_callbacks.get(EpochCallback.__name__)
        if not is_mapping(found):
            raise LlmselectError("the checkpoint was made without a schedule; resume it without one, or start anew")
        return self._resume(found["attributes"]["saved"])

    def _resume(self, saved: dict[str, Any]) -> tuple[int, int]:
        """The epoch to go on with, and how many of its batches are done."""
        callback = self.epoch_callback
        if saved["rows_per_step"] != callback.rows_per_step:
            raise LlmselectError(
                f"the checkpoint has steps of {saved['rows_per_step']} rows, this training of {callback.rows_per_step}; resume "
                "with the same batch size times accumulation steps times processes"
            )
        self._epochs.restore(saved)
        epoch, done = saved["epoch"], self.state.global_step - saved["first_step"]
        if done >= saved["steps"]:
            callback.next = epoch + 1
            return epoch + 1, 0
        callback.next, callback.first_step, callback.resumed = epoch, saved["first_step"], True
        return epoch, 0 if self.args.ignore_data_skip else done * self.args.gradient_accumulation_steps

    def _run_epoch(self, **kwargs: Any) -> None:
        trainer: Any = super()
        assert self._epochs.epoch == kwargs["epoch"]
        batches = len(kwargs["train_dataloader"])
        steps = max(1, -(-batches // self.args.gradient_accumulation_steps))
        self.epoch_callback.steps = steps
        trainer._run_epoch(**{**kwargs, "steps_in_epoch": batches, "num_update_steps_per_epoch": steps})

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False,
                     num_items_in_batch: Any = None) -> Any:  # fmt: skip
        """The weighted loss of a training batch, whose rows' losses are recorded; the Trainer's own in evaluation."""
        if ROW not in inputs:
            trainer: Any = super()
            return trainer.compute_loss(model, inputs, return_outputs, num_items_in_batch)
        fed = {k: v for k, v in inputs.items() if k not in (ROW, WEIGHT, "labels")}
        outputs = model(**fed, use_cache=False)
        sums, count = row_sums(outputs.logits, inputs["labels"])
        self.epoch_callback.record(inputs[ROW], sums.detach() / count)  # 0 / 0 is NaN: a row without labels
        loss = weighted_loss(sums, inputs[WEIGHT], count.sum() if num_items_in_batch is None else num_items_in_batch)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # gradients are averaged over processes, tokens were summed
        return (loss, outputs) if return_outputs else loss
