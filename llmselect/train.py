"""LoRA fine-tuning on a selection through TRL and PEFT, at a fixed budget of supervised tokens."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmselect import atomic, config
from llmselect.errors import LlmselectError, UsageError, nearest, require
from llmselect.packing import check_packing, packed, padded
from llmselect.token_steps import Schedule, labels, parts, schedule

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger("llmselect")

LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear"}
SFT = {"learning_rate": 2e-4, "lr_scheduler_type": "cosine", "warmup_steps": 0.03, "weight_decay": 0.0,
       "gradient_checkpointing": False, "logging_steps": 10, "report_to": "none"}  # fmt: skip
OWNED = {"output_dir": "out", "max_steps": "train.tokens", "num_train_epochs": "train.tokens", "seed": "seeds",
         "data_seed": "seeds", "per_device_train_batch_size": "train.batch_tokens", "max_length": "train.max_length",
         "packing": "train.packing", "padding_free": "train.packing", "assistant_only_loss": "nothing: responses are learned",
         "completion_only_loss": "nothing: responses are learned", "bf16": "model.dtype",
         "fp16": "model.dtype",
         "logging_nan_inf_filter": "nothing", "dataset_kwargs": "nothing", "use_cpu": "nothing"}  # fmt: skip


@dataclass(frozen=True)
class Train:
    """The `train:` section of a recipe."""

    tokens: int | None = field(default=None, metadata={"help": "supervised tokens seen; null: one epoch of the selection"})
    batch_tokens: int = field(default=2048, metadata={"help": "supervised tokens of an optimizer step"})
    max_length: int | None = field(default=None, metadata={"help": "tokens of a row; null: model.max_length"})
    packing: bool = field(default=True, metadata={"help": "several rows in one sequence, kept apart; less padding"})
    sft: dict[str, Any] = field(default_factory=dict, metadata={"help": "TRL SFTConfig settings by their own names"})
    lora: dict[str, Any] = field(default_factory=dict, metadata={"help": "PEFT LoraConfig settings by their own names"})

    def __post_init__(self) -> None:
        for name in ("tokens", "batch_tokens", "max_length"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UsageError(f"{name}: {getattr(self, name)} must be at least 1")


@dataclass(frozen=True)
class TrainResult:
    """What a training run did; `seconds` without loading."""

    adapter: str
    steps: int
    tokens: int
    epochs: float
    train_loss: float
    seconds: float


def validate(train: Train) -> None:
    """Check the names in `sft` and `lora` against TRL and PEFT, before any model loads."""
    sft = require("trl", "train").SFTConfig
    lora = require("peft", "train").LoraConfig
    for section, cls, given in (("train.sft", sft, train.sft), ("train.lora", lora, train.lora)):
        known = [f.name for f in fields(cls)]
        for key in given:
            if section == "train.sft" and key in OWNED:
                raise UsageError(f"{section}.{key}: llmselect sets this itself; use {OWNED[key]}")
            if key not in known:
                raise UsageError(f"{section}.{key}: {cls.__name__} has no such setting.{nearest(key, known)}")


def finetune(rows: Dataset, model: str, out: Path, train: Train, *, seed: int, dtype: str = "auto", max_length: int | None = None,
             provenance: Mapping[str, Any] | None = None) -> TrainResult:  # fmt: skip
    """Train a LoRA adapter on the responses of `rows` and save it to `out`, complete or absent.

    An adapter already there that was made from the same rows, settings and seed is returned as it is.

    Errors: `LlmselectError` when `out` holds something else, when no row has a response, when the loss is not finite.
    """
    key = {"model": model, "rows": config.fingerprint(list(rows["id"])), "train": config.to_dict(train), "seed": seed,
           "dtype": dtype, "max_length": train.max_length or max_length}  # fmt: skip
    if (out / "train.json").exists():
        stored = json.loads((out / "train.json").read_text())
        if lines := config.difference(stored["key"], json.loads(json.dumps(key))):
            raise LlmselectError(f"{out} holds an adapter made otherwise:\n  " + "\n  ".join(lines)
                                 + "\nDelete it, or give the run another out=.")  # fmt: skip
        return TrainResult(**{**stored["result"], "adapter": str(out)})
    from transformers import set_seed

    from llmselect.engine.backbone import Backbone

    set_seed(seed)
    backbone = Backbone(model, None, dtype, train.max_length or max_length)
    encoder = backbone.encoder
    plan = schedule(len(rows), lambda i: encoder.encode(rows[list(i)]["messages"]) if i else [], train.tokens,
                    train.batch_tokens, seed)  # fmt: skip
    if train.packing:
        check_packing(backbone.causal_lm, backbone.pad)
    trainer = _trainer(backbone, plan, train, seed, out)
    start = time.monotonic()
    found = trainer.train()
    seconds = time.monotonic() - start
    _refuse_non_finite(trainer, found.training_loss, rows, plan)
    result = TrainResult(str(out), len(plan.steps), plan.tokens, round(plan.epochs, 4), found.training_loss, seconds)
    if trainer.accelerator.is_main_process:
        _save(trainer, out, key, result, backbone, provenance or {})
    trainer.accelerator.wait_for_everyone()
    return result


def _trainer(backbone: Any, plan: Schedule, train: Train, seed: int, out: Path) -> Any:
    from datasets import Dataset
    from peft import LoraConfig
    from torch.utils.data import DataLoader
    from transformers import PrinterCallback
    from trl.trainer.sft_trainer import SFTTrainer

    segments = [segment for step in plan.steps for segment in step]
    data = Dataset.from_dict({
        "input_ids": [plan.rows[row].ids.tolist() for row, _, _ in segments],
        "labels": [labels(plan.rows[row], a, b).tolist() for row, a, b in segments],
    })  # fmt: skip

    class TokenStepTrainer(SFTTrainer):
        """SFTTrainer whose batches are the planned steps."""

        def get_train_dataloader(self) -> DataLoader:
            count = self.accelerator.num_processes * self.args.gradient_accumulation_steps
            batches = list(step_batches(plan, count))
            loader: DataLoader = DataLoader(data, batch_sampler=batches, collate_fn=self.data_collator)  # type: ignore[arg-type]
            return self.accelerator.prepare(loader)

    model = backbone.causal_lm.requires_grad_(True)
    trainer = TokenStepTrainer(
        model=model, args=_settings(backbone, plan, train, seed, out), train_dataset=data, processing_class=backbone.tokenizer,
        peft_config=LoraConfig(**{"task_type": "CAUSAL_LM", **LORA, **train.lora}),
        data_collator=packed(backbone.pad, backbone.encoder.max_length) if train.packing else padded(backbone.pad),
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    return trainer


def _settings(backbone: Any, plan: Schedule, train: Train, seed: int, out: Path) -> Any:
    import sys

    import torch
    from trl.trainer.sft_config import SFTConfig

    cuda = torch.cuda.is_available()
    return SFTConfig(**{
        **SFT, "disable_tqdm": not sys.stderr.isatty(), **train.sft, "output_dir": str(out.parent / f".{out.name}.trainer"),
        "max_steps": len(plan.steps), "seed": seed, "bf16": cuda and backbone.dtype == torch.bfloat16, "use_cpu": not cuda,
        "save_strategy": "no", "max_length": None, "dataset_kwargs": {"skip_prepare_dataset": True},
        "logging_nan_inf_filter": False,  # by default a NaN loss is logged as 0
        "remove_unused_columns": False, "dataloader_pin_memory": cuda,
    })  # fmt: skip


def step_batches(plan: Schedule, count: int) -> Iterator[list[int]]:
    """Item numbers of each batch: every step gives `count` of them, one per process and micro-batch.

    Errors: `LlmselectError` when a step has fewer items than there are processes and micro-batches.
    """
    at = 0
    for step in plan.steps:
        items = list(range(at, at + len(step)))
        lengths = {i: len(plan.rows[segment[0]].ids) for i, segment in zip(items, step, strict=True)}
        shares = parts(items, lengths, count)  # type: ignore[arg-type]
        if not all(shares):
            raise LlmselectError(
                f"a step of {len(items)} rows cannot be shared by {count} processes × gradient_accumulation_steps; "
                "raise train.batch_tokens"
            )
        yield from shares
        at += len(step)


def _refuse_non_finite(trainer: Any, loss: float, rows: Dataset, plan: Schedule) -> None:
    losses = [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    bad = next(((step, one) for step, one in [*losses, (len(plan.steps), loss)] if one != one or abs(one) == float("inf")), None)
    if bad is None and not all(bool(p.isfinite().all()) for p in trainer.model.parameters() if p.requires_grad):
        bad = len(plan.steps), float("nan")
    if bad:
        segments = plan.steps[min(bad[0], len(plan.steps)) - 1]
        ids = [rows[plan.numbers[row]]["id"] for row, _, _ in segments[:5]]
        raise LlmselectError(f"training diverged: loss {bad[1]} at step {bad[0]} (rows {', '.join(ids)}, …); no adapter "
                             "was saved; lower train.sft.learning_rate or use float32")  # fmt: skip


def _save(trainer: Any, out: Path, key: dict, result: TrainResult, backbone: Any, provenance: Mapping[str, Any]) -> None:
    from importlib.metadata import version

    versions = {name: version(name) for name in ("torch", "transformers", "peft", "trl")}
    public = key | {"model": Path(key["model"]).name if Path(key["model"]).exists() else key["model"]}
    with atomic.replace_dir(out) as beside:
        trainer.model.save_pretrained(beside, safe_serialization=True)
        card = _card(public, result, provenance, versions)
        (beside / "README.md").write_text(card, "utf-8")
        about = {
            "key": key,
            "result": asdict(replace(result, adapter=out.name)),
            "provenance": dict(provenance),
            "versions": versions,
        }
        atomic.write_json(beside / "train.json", about)


def _card(key: Mapping[str, Any], result: TrainResult, provenance: Mapping[str, Any], versions: Mapping[str, str]) -> str:
    """A model card: what was trained on what; no licence is claimed, since that of the data decides."""
    import yaml

    head = yaml.safe_dump({"base_model": key["model"], "library_name": "peft", "tags": ["llmselect", "lora", "sft"]})
    told = {**provenance, **key["train"], "seed": key["seed"], "steps": result.steps, "supervised tokens": result.tokens,
            "epochs": result.epochs, "training loss": round(result.train_loss, 4), **versions}  # fmt: skip
    lines = [f"| {k} | `{json.dumps(v)}` |".replace("\n", " ") for k, v in told.items()]
    return (f"---\n{head}---\n\n# LoRA adapter of {key['model']}\n\nFine-tuned on the responses of a subset chosen by "
            "llmselect.\n\n| | |\n|---|---|\n" + "\n".join(lines) + "\n")  # fmt: skip
