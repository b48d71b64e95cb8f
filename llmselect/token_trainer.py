"""TRL's SFTTrainer on planned micro-batches, its loss the mean over the supervised tokens of a whole step."""

from __future__ import annotations

# datasets has no types.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
import logging
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from llmselect.errors import LlmselectError, require
from llmselect.token_batches import MicroBatches

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor

log = logging.getLogger("llmselect")


def token_trainer(backbone: Any, batches: MicroBatches, settings: Any, lora: Any, micro_tokens: int) -> Any:
    """A trainer of a fresh LoRA adapter on `batches`.

    Errors: `ValueError` of TRL or PEFT when the settings do not fit the model.
    """
    from datasets import Dataset
    from transformers import PrinterCallback

    settings.device  # noqa: B018 - sets the number of GPUs, which is read next
    # Several visible GPUs would mean nn.DataParallel, which SFTTrainer refuses; more GPUs are more processes.
    settings._n_gpu = min(settings._n_gpu, 1)
    trainer = _trainer_class()(
        model=backbone.causal_lm.requires_grad_(True), args=settings, processing_class=backbone.tokenizer,
        peft_config=lora, data_collator=batches.collate,
        train_dataset=Dataset.from_dict({"input_ids": [[backbone.pad]], "labels": [[-100]]}),  # stands in for `batches`
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.batches, trainer.micro_tokens, trainer.losses = batches, micro_tokens, []
    return trainer


def keep_checkpoints(trainer: Any, folder: Path, count: int) -> None:
    """Write the adapter and the optimizer's state `count` times, at equal parts of the training, under their step."""
    from transformers import TrainerCallback

    from llmselect.engine import moments

    steps = len(trainer.batches.plan.steps)
    wanted = {round(steps * (i + 1) / count) for i in range(count)} - {0}
    if len(wanted) < count:
        log.warning("train.checkpoints: of %d only %d are kept, the training has no more steps; give train.epochs or "
                    "train.batch_tokens for more of them", count, len(wanted))  # fmt: skip

    class Checkpoints(TrainerCallback):
        rates: ClassVar[list[float]] = []

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.rates.append(float(kwargs["optimizer"].param_groups[0]["lr"]))

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step in wanted:
                if trainer.accelerator.is_main_process:
                    model = trainer.accelerator.unwrap_model(kwargs["model"])
                    mean = sum(self.rates) / len(self.rates)
                    moments.save(folder / f"{state.global_step:05d}", model, kwargs["optimizer"], state.global_step, mean)
                self.rates.clear()

    trainer.add_callback(Checkpoints())


class _Planned:
    """What is not SFTTrainer's own: reads `batches`, divides by the step's planned number of supervised tokens."""

    loss_is_scaled_for_ga = True
    batches: MicroBatches
    micro_tokens: int
    losses: list[Tensor]
    args: Any
    state: Any
    accelerator: Any
    label_smoother: Any
    aux_loss_enabled: bool

    def get_train_dataloader(self) -> Any:
        """This process's micro-batches. Accelerate would share out batches of one fixed size only."""
        from torch.utils.data import DataLoader

        batches: Any = self.batches
        return DataLoader(batches, batch_size=None, shuffle=False, num_workers=self.args.dataloader_num_workers,
                          pin_memory=self.args.dataloader_pin_memory)  # fmt: skip

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False,
                     num_items_in_batch: Any = None) -> Any:  # fmt: skip
        """Sum over this micro-batch's supervised tokens, over the tokens of the step.

        Times the number of processes, because gradients are averaged over them.
        """
        from torch import tensor

        tokens = sum(stop - start for _, start, stop in self.batches.plan.steps[int(self.state.global_step)])
        plain = self.args.loss_type == "nll" and self.label_smoother is None and not self.aux_loss_enabled
        device = self.args.device
        if device.type != "cpu" or not plain or return_outputs:
            trainer: Any = super()
            return trainer.compute_loss(model, inputs, return_outputs, tensor(tokens, device=device))
        # Off the GPU, TRL's head scores prompts and padding as well: 1.4 × the time of a step.
        head = self.accelerator.unwrap_model(model).get_output_embeddings()
        return supervised_nll(model, head, inputs) * (self.accelerator.num_processes / tokens)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """One micro-batch. Trainer's own logs replace a NaN by the mean so far, so it is looked for here."""
        trainer: Any = super()
        loss = trainer.training_step(*args, **kwargs)
        if not loss.isfinite():
            raise _Diverged(float(loss))
        self.losses.append(loss)
        return loss


@lru_cache(maxsize=1)
def _trainer_class() -> Any:
    return type("TokenTrainer", (_Planned, require("trl", "train").SFTTrainer), {})


class _Diverged(Exception):
    """Raised at the first loss that is not finite."""


def supervised_nll(model: Any, head: Any, inputs: dict[str, Any]) -> Tensor:
    """Summed −log p of the labelled tokens; the LM head sees only the positions that predict one."""
    from torch.nn.functional import cross_entropy

    told = inputs["labels"][:, 1:]
    keep = told != -100

    def predicting(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return args[0][:, :-1][keep], *args[1:]

    hook = head.register_forward_pre_hook(predicting)
    try:
        logits = model(**{k: v for k, v in inputs.items() if k != "labels"}, use_cache=False).logits
    finally:
        hook.remove()
    return cross_entropy(logits.float(), told[keep], reduction="sum")


def gathered(model: Any) -> dict[str, Tensor] | None:
    """The trained weights by name, whole, where FSDP has sharded them; None where it has not. Every process calls this."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not any(hasattr(p, "full_tensor") for p in trained.values()):
        return None
    return {name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().cpu() for name, p in trained.items()}


def run(trainer: Any, rows: Dataset) -> float:
    """Train; returns the mean over steps of the loss.

    Errors: `LlmselectError` naming step and rows when loss or weights stop being finite, or when memory runs out.
    """
    import torch

    from llmselect.engine.memory import is_out_of_memory

    bad: float | None = None
    try:
        trainer.train()
    except _Diverged as error:
        bad = error.args[0]
    except Exception as error:
        if is_out_of_memory(error):
            raise LlmselectError(f"out of memory with micro-batches of {trainer.micro_tokens} tokens; "
                                 f"type train.micro_tokens={max(1, trainer.micro_tokens // 2)}") from error  # fmt: skip
        raise
    step = trainer.state.global_step
    mine = (p.to_local() if hasattr(p, "to_local") else p for p in trainer.model.parameters() if p.requires_grad)
    sound = all(bool(p.isfinite().all()) for p in mine)
    if bad is not None or not sound:
        # Weights that were not finite before this step were spoilt by the update of the one before.
        raise _refusal(trainer, rows, step if sound else step - 1, "loss" if sound else "update")
    total = torch.stack(trainer.losses).sum() / max(step, 1)
    return float(trainer.accelerator.reduce(total, "mean"))


def _refusal(trainer: Any, rows: Dataset, step: int, what: str) -> LlmselectError:
    plan = trainer.batches.plan
    numbers = list(dict.fromkeys(plan.numbers[row] for row, _, _ in plan.steps[step]))
    ids: list[str] = [rows[number]["id"] for number in numbers[:8]]
    more = f" and {len(numbers) - len(ids)} more" if len(numbers) > len(ids) else ""
    return LlmselectError(
        f"training diverged: the {what} of step {step + 1} of {len(plan.steps)} is not finite "
        f"(rows {', '.join(ids)}{more}); no adapter was saved; lower train.sft.learning_rate or use float32"
    )
