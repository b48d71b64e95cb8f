"""LoRA fine-tuning on a selection through TRL and PEFT, at a fixed budget of supervised tokens."""

from __future__ import annotations

# datasets and accelerate have no types.
# pyright: reportMissingTypeStubs=false
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from llmselect import adapter_card, atomic, config
from llmselect.dynamic.planned import planned, planned_order
from llmselect.errors import LlmselectError, UsageError, nearest, require
from llmselect.packing import check_packing, packed, padded
from llmselect.token_batches import MicroBatches, accumulation
from llmselect.token_steps import Schedule, schedule

if TYPE_CHECKING:
    from datasets import Dataset

    from llmselect.chat import Encoded

log = logging.getLogger("llmselect")

LORA: dict[str, Any] = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear"}
SFT: dict[str, Any] = {"learning_rate": 2e-4, "lr_scheduler_type": "cosine", "warmup_steps": 0.03, "weight_decay": 0.0,
       "gradient_checkpointing": False, "logging_steps": 10, "report_to": "none"}  # fmt: skip
_RESPONSES, _COMPLETE = "nothing: responses are always what is learned", "nothing: an adapter is saved once, complete"
CHECKPOINTS = "checkpoints"
_TEST = "targets.<name>.test"
OWNED = {
    "output_dir": "out", "max_steps": "train.tokens", "num_train_epochs": "train.tokens", "seed": "seeds",
    "data_seed": "seeds", "per_device_train_batch_size": "train.batch_tokens",
    "auto_find_batch_size": "train.micro_tokens",
    "gradient_accumulation_steps": "train.micro_tokens", "max_length": "train.max_length", "packing": "train.packing",
    "padding_free": "train.packing", "assistant_only_loss": _RESPONSES, "completion_only_loss": _RESPONSES,
    "average_tokens_across_devices": "nothing: a step's loss is always the mean over its supervised tokens",
    "bf16": "model.dtype", "fp16": "model.dtype", "use_cpu": "nothing", "dataset_kwargs": "nothing",
    "save_strategy": _COMPLETE, "save_steps": _COMPLETE, "load_best_model_at_end": _COMPLETE, "push_to_hub": _COMPLETE,
    "resume_from_checkpoint": _COMPLETE, "eval_strategy": _TEST, "eval_on_start": _TEST, "do_eval": _TEST,
}  # fmt: skip
"""Settings of SFTConfig that llmselect makes itself, and the key to use in their place."""


@dataclass(frozen=True)
class Train:
    """The `train:` section of a recipe."""

    tokens: int | None = field(default=None, metadata={"help": "supervised tokens seen; null: `epochs` of the rows"})
    epochs: int = field(default=1, metadata={"help": "passes over the rows when tokens is null"})
    batch_tokens: int = field(default=2048, metadata={"help": "supervised tokens of an optimizer step"})
    micro_tokens: int | None = field(
        default=None,
        metadata={"help": "tokens of one forward: more need more memory; null: 16384 on a GPU, 2048 on a CPU"},
    )
    max_length: int | None = field(default=None, metadata={"help": "tokens of a row; null: model.max_length"})
    packing: bool | None = field(
        default=None, metadata={"help": "several rows in one sequence, kept apart; null: on a GPU, where it is faster"}
    )
    schedule: dict[str, Any] | None = field(
        default=None, metadata={"help": "other rows every epoch, {name: rs2, budget: 10%}; null: all rows"}
    )
    checkpoints: int = field(default=0, metadata={"help": "keep adapter and optimizer state at this many equal parts (LESS)"})
    sft: dict[str, Any] = field(default_factory=dict[str, Any], metadata={"help": "TRL SFTConfig settings by their own names"})
    lora: dict[str, Any] = field(default_factory=dict[str, Any], metadata={"help": "PEFT LoraConfig settings by their own names"})

    def __post_init__(self) -> None:
        for name in ("tokens", "epochs", "batch_tokens", "micro_tokens", "max_length"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UsageError(f"{name}: {getattr(self, name)} must be at least 1")
        if self.tokens is not None and self.epochs != 1:
            raise UsageError("tokens and epochs both say how long to train; give one of them")
        if self.checkpoints < 0:
            raise UsageError(f"checkpoints: {self.checkpoints} must be 0 or more")


@dataclass(frozen=True)
class TrainResult:
    """What a training run did; `tokens` are supervised ones, `train_loss` is the mean over steps in nats per token,
    `seconds` are those of the steps alone."""

    adapter: str
    steps: int
    tokens: int
    epochs: float
    train_loss: float
    seconds: float


def validate(train: Train, where: str = "train") -> None:
    """Check `sft` and `lora` of section `where` against TRL and PEFT, and `schedule`, before any model loads.

    Errors: `UsageError` naming the key: unknown, set by llmselect itself, or of a wrong value; `MissingExtra`.
    """
    planned(train.schedule)
    sft = require("trl", "train").SFTConfig
    lora = require("peft", "train").LoraConfig
    for section, cls, given in ((f"{where}.sft", sft, train.sft), (f"{where}.lora", lora, train.lora)):
        known = [f.name for f in fields(cls)]
        for key in given:
            if cls is sft and key in OWNED:
                raise UsageError(f"{section}.{key}: llmselect sets this itself; use {OWNED[key].replace('train.', f'{where}.')}")
            if key not in known:
                raise UsageError(f"{section}.{key}: {cls.__name__} has no such setting.{nearest(key, known)}")
    section = f"{where}.sft"
    try:
        _sft(train, output_dir="unused")
        section = f"{where}.lora"
        _lora(train)
    except (ValueError, TypeError) as error:
        raise UsageError(f"{section}: {str(error).strip().splitlines()[0]}") from error


def _sft(train: Train, *, cuda: bool = False, **ours: Any) -> Any:
    SFTConfig = require("trl", "train").SFTConfig
    # YAML 1.1 reads 2e-4 as text.
    numbers = {f.name for f in fields(SFTConfig) if type(f.default) in (int, float)}
    given = {k: float(v) if k in numbers and isinstance(v, str) else v for k, v in train.sft.items()}
    # transformers warns about the old one of these two names, earlier releases know only that one.
    old, new = "gradient_checkpointing", "activation_checkpointing"
    if any(f.name == new for f in fields(SFTConfig)):
        for ending in ("", "_kwargs"):
            if old + ending in given:
                given.setdefault(new + ending, given.pop(old + ending))
        defaults = {new if k == old else k: v for k, v in SFT.items()}
    else:
        defaults = SFT
    return SFTConfig(**{
        "disable_tqdm": not sys.stderr.isatty(), "dataloader_pin_memory": cuda, **defaults, **given, "bf16": False,
        "use_cpu": not cuda, "save_strategy": "no", "max_length": None, "remove_unused_columns": False,
        "dataset_kwargs": {"skip_prepare_dataset": True}, **ours,
    })  # fmt: skip


def _lora(train: Train) -> Any:
    from peft import LoraConfig

    settings: dict[str, Any] = {"task_type": "CAUSAL_LM", **LORA, **train.lora}
    return LoraConfig(**settings)


def finetune(rows: Dataset, model: str, out: Path, train: Train, *, seed: int, dtype: str = "float32",
             max_length: int | None = None, device: str | None = None, provenance: Mapping[str, Any] | None = None,
             tokens: Path | None = None) -> TrainResult:  # fmt: skip
    """Train a LoRA adapter on the responses of `rows` and save it to `out`, complete or absent.

    Loss of a step: −(1/N) Σ log p(token | what precedes it) over the step's N supervised tokens, whatever the number
    of processes and micro-batches. N is `train.batch_tokens` (the rest in the last step), so selections of any row
    lengths are trained for the same tokens in the same number of steps. The same seed gives the same adapter.

    An adapter already there that was made from the same rows, weights, settings and seed is returned as it is.

    Args:
        rows: columns `id` and `messages`.
        model: folder or Hub id.
        dtype: of the frozen weights: `float32`, `bfloat16` (on a GPU with autocast) or `auto`.
        max_length: tokens of a row, unless `train.max_length` is given; None takes the model's, at most 2048.
        device: `cpu` keeps off the GPU. Several GPUs: `accelerate launch`, one process each.
        provenance: how the rows were selected, for the adapter's card.
        tokens: a folder where the rows' tokens are kept (`FeatureStore.tokens`).

    Errors: `UsageError` for wrong settings; `LlmselectError` when `out` holds something else, when a row has no
    supervised token, when loss or weights stop being finite, when memory runs out.
    """
    out, provenance = Path(out), dict(provenance or {})
    validate(train)
    if train.checkpoints and os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        raise UsageError("train.checkpoints: the optimizer's state is sharded under FSDP; launch warm-ups without it, "
                         "e.g. with recipes/launch/ddp.yaml")  # fmt: skip
    from llmselect.engine.backbone import Backbone
    from llmselect.token_trainer import gathered, keep_checkpoints, run

    backbone = Backbone(model, None, dtype, train.max_length or max_length, device, tokens)
    ids: list[str] = [*rows["id"]]
    key = {"model": model, "weights": _weights(backbone), "tokens": backbone.encoder.fingerprint,
           "rows": config.fingerprint(ids), "train": _settings(train), "seed": seed,
           "dtype": dtype, "max_length": backbone.encoder.max_length}  # fmt: skip
    if (done := _finished(out, key)) is not None:
        return done
    encode = partial(_encode, backbone, rows)
    order = planned_order(train.schedule, train.epochs, ids, seed)
    plan = schedule(len(rows), encode, train.tokens, train.batch_tokens, seed, 64, train.epochs, order)
    with TemporaryDirectory(prefix="llmselect-train-") as scratch:
        trainer = _trainer(backbone, plan, train, seed, scratch)
        if train.checkpoints:
            keep_checkpoints(trainer, Path(scratch) / CHECKPOINTS, train.checkpoints)
        start = time.monotonic()
        loss = run(trainer, rows)
        seconds = time.monotonic() - start
        result = TrainResult(str(out), len(plan.steps), plan.tokens, round(plan.epochs, 4), loss, seconds)
        weights = gathered(trainer.model)
        if trainer.accelerator.is_main_process:
            _save(trainer, weights, out, key, result, {**provenance, "rows": len(rows)}, Path(scratch))
    trainer.accelerator.wait_for_everyone()
    return result


def _settings(train: Train) -> dict[str, Any]:
    """For an adapter's identity; without a schedule as before there were any, so that older adapters still count."""
    return {k: v for k, v in config.to_dict(train).items() if k != "schedule" or v is not None}


def _weights(backbone: Any) -> str:
    """Identity of the weights; local files are read once for all the trainings of a process."""
    if not Path(backbone.path).is_dir():
        return backbone.digest()
    stats = [(f.name, f.stat()) for f in sorted(Path(backbone.path).glob("*"))]
    return _digest(backbone.path, tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats))


@lru_cache(maxsize=8)
def _digest(path: str, stamps: tuple[tuple[str, int, int], ...]) -> str:
    from llmselect.engine.backbone import weights_digest

    return weights_digest(path)


def _finished(out: Path, key: dict[str, Any]) -> TrainResult | None:
    if not (out / "train.json").exists():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise LlmselectError(f"{out} holds files that are no adapter of llmselect; give another out=")
        return None
    stored = atomic.read_sealed(out / "train.json", f"delete {out} and run again")
    if lines := config.difference(stored["key"], json.loads(json.dumps(key))):
        raise LlmselectError(f"{out} holds an adapter made otherwise:\n  " + "\n  ".join(lines)
                             + "\nDelete it, or give the run another out=.")  # fmt: skip
    for name, digest in stored["sha256"].items():
        if not (out / name).exists() or atomic.sha256_file(out / name) != digest:
            raise LlmselectError(f"{out / name} is damaged or missing; delete {out} and run again")
    return replace(TrainResult(**stored["result"]), adapter=str(out))


def _encode(backbone: Any, rows: Dataset, numbers: Any) -> list[Encoded]:
    if not numbers:
        return []
    found = backbone.encoder.encode(rows[list(numbers)]["messages"])
    for row in found:
        row.response[:1] = False  # nothing precedes the first token: it cannot be predicted
    empty: list[str] = [rows[n]["id"] for n, row in zip(numbers, found, strict=True) if not row.response.any()]
    if empty:
        raise LlmselectError(
            f"{len(empty)} rows have no supervised token within max_length={backbone.encoder.max_length}: "
            f"{', '.join(empty[:5])}; raise max_length or leave them out of the pool"
        )
    return found


def _trainer(backbone: Any, plan: Schedule, train: Train, seed: int, scratch: str) -> Any:
    import torch
    from accelerate import PartialState
    from transformers import set_seed

    from llmselect.token_trainer import token_trainer

    cuda = backbone.device.type == "cuda"
    packing = cuda if train.packing is None else train.packing
    micro_tokens = train.micro_tokens or (16384 if cuda else 2048)
    if packing:
        check_packing(backbone.causal_lm, backbone.pad)
    state: Any = PartialState()
    count = accumulation(plan, micro_tokens, state.num_processes, packing)
    collate = packed(backbone.pad, backbone.encoder.max_length) if packing else padded(backbone.pad)
    batches = MicroBatches(plan, collate, count, state.num_processes, state.process_index, packing)
    # Of one step the first is the warm-up's, whose rate is 0: nothing would be learned.
    cold = {"warmup_steps": 0} if len(plan.steps) == 1 and "warmup_steps" not in train.sft else {}
    settings = _sft(train, **cold, cuda=cuda, output_dir=scratch, max_steps=len(plan.steps), seed=seed,
                    gradient_accumulation_steps=count, bf16=cuda and backbone.dtype == torch.bfloat16)  # fmt: skip
    set_seed(seed)  # LoRA's first values are drawn when the trainer is made
    try:
        return token_trainer(backbone, batches, settings, _lora(train), micro_tokens)
    except ValueError as error:
        raise UsageError(f"train: {str(error).strip().splitlines()[0]}") from error


def _save(trainer: Any, weights: dict[str, Any] | None, out: Path, key: dict[str, Any], result: TrainResult,
          provenance: dict[str, Any], scratch: Path) -> None:  # fmt: skip
    from importlib.metadata import version

    versions = {name: version(name) for name in ("torch", "transformers", "peft", "trl")}
    with atomic.replace_dir(out) as beside:
        trainer.model.save_pretrained(beside, safe_serialization=True, state_dict=weights)
        adapter_card.sort_modules(beside)
        settings = {"LoRA": LORA | key["train"]["lora"], "SFT": SFT | key["train"]["sft"]}
        card = adapter_card.card(key, settings, asdict(result), provenance, versions)
        (beside / "README.md").write_text(card, "utf-8")
        if (scratch / CHECKPOINTS).exists():
            shutil.copytree(scratch / CHECKPOINTS, beside / CHECKPOINTS)
        digests = {str(f.relative_to(beside)): atomic.sha256_file(f) for f in sorted(beside.rglob("*")) if f.is_file()}
        told = {**asdict(result), "adapter": out.name}
        about = {"key": key, "result": told, "provenance": provenance, "versions": versions, "sha256": digests}
        atomic.write_sealed(beside / "train.json", about)
