"""Train a sparse autoencoder on the hidden states of a pool with sae-lens: streamed, resumable, judged on held-out rows."""

from __future__ import annotations

# sae-lens and datasets have no types, torch has them in part.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
import json
import logging
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from llmselect import atomic, config
from llmselect.errors import LlmselectError, UsageError, require
from llmselect.sae.states import States

if TYPE_CHECKING:
    import torch
    from datasets import Dataset

    from llmselect.engine.backbone import Backbone

log = logging.getLogger("llmselect")
CHECKPOINT_SECONDS = 60.0


@dataclass(frozen=True)
class SaeTraining:
    """The `sae:` section of a recipe."""

    layer: int = field(default=-2, metadata={"help": "hidden state; -2: the output of the last block but one"})
    kind: Literal["topk", "batchtopk"] = field(default="topk", metadata={"help": "k latents a token, or k on average"})
    expansion: int = field(default=8, metadata={"help": "latents per number of the hidden state"})
    k: int = field(default=32, metadata={"help": "latents that fire per token"})
    tokens: int = field(default=2_000_000, metadata={"help": "tokens seen; a larger pool is not read further"})
    batch_tokens: int = field(default=1024, metadata={"help": "tokens of an optimizer step"})
    buffer_tokens: int = field(default=65_536, metadata={"help": "states held at a time, shuffled together"})
    learning_rate: float = 1e-3
    held_out_rows: int = field(default=200, metadata={"help": "rows never trained on, to measure on"})
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("expansion", "k", "tokens", "batch_tokens", "held_out_rows"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name}: {getattr(self, name)} must be at least 1")
        if self.buffer_tokens < self.batch_tokens:
            raise UsageError(f"buffer_tokens: {self.buffer_tokens} must hold a step of {self.batch_tokens} tokens")

    @property
    def steps(self) -> int:
        return max(1, self.tokens // self.batch_tokens)


@dataclass(frozen=True)
class SaeReport:
    """`fvu` (fraction of variance unexplained) and `l0` (latents that fire per token) on held-out rows; `dead`: latents
    silent throughout the last tenth of the training."""

    fvu: float
    l0: float
    dead: int
    width: int
    tokens: int
    seconds: float

    def describe(self) -> str:
        """One line for a person."""
        return (f"held-out variance unexplained {self.fvu:.3f}, {self.l0:.1f} latents a token, "
                f"{self.dead} of {self.width} dead, {self.tokens:,} tokens in {self.seconds:.0f} s")  # fmt: skip


def train_sae(pool: Dataset, backbone: Backbone, out: Path, settings: SaeTraining) -> SaeReport:
    """Train an SAE on the states of `pool`'s prompt and response tokens and save it to `out` in sae-lens's format.

    The same seed gives the same weights (to a GEMM's last bits), whether or not the training was interrupted. An SAE
    already there that was made from the same rows, weights and settings is kept.

    Errors: `MissingExtra` without sae-lens; `LlmselectError` when `out` holds something else or the loss diverges.
    """
    from llmselect.engine.extraction import content_digest

    layer = backbone.layer(settings.layer)
    if layer == backbone.depth:
        raise UsageError("sae.layer: the last hidden state is taken after the norm; give -2 or a lower one")
    if len(pool) <= settings.held_out_rows:
        raise UsageError(f"sae.held_out_rows: {settings.held_out_rows} leaves nothing of {len(pool)} rows to train on")
    key = {"rows": content_digest(pool), "weights": backbone.digest(), "tokens": backbone.encoder.fingerprint,
           "settings": config.to_dict(settings)}  # fmt: skip
    if (done := _finished(out, key)) is not None:
        return done
    run = _Training(pool, backbone, layer, settings, out.with_name(f"{out.name}.training"), key)
    start = time.monotonic()
    run.fit()
    return run.save(out, time.monotonic() - start)


def _finished(out: Path, key: Mapping[str, Any]) -> SaeReport | None:
    if not (out / "training.json").exists():
        if out.exists() and any(out.iterdir()):
            raise LlmselectError(f"{out} holds files that are no SAE of llmselect; give another out=")
        return None
    stored = atomic.read_sealed(out / "training.json", f"delete {out} and run again")
    if lines := config.difference(stored["key"], json.loads(json.dumps(key))):
        raise LlmselectError(
            f"{out} holds an SAE made otherwise:\n  " + "\n  ".join(lines) + "\nDelete it, or give another out=."
        )
    for name, digest in stored["sha256"].items():
        if not (out / name).exists() or atomic.sha256_file(out / name) != digest:
            raise LlmselectError(f"{out / name} is damaged or missing; delete {out} and run again")
    return SaeReport(**stored["report"])


class _Training:
    """sae-lens's trainer, fed buffer by buffer; between buffers its whole state can be written."""

    def __init__(self, pool: Dataset, backbone: Backbone, layer: int, settings: SaeTraining, scratch: Path,
                 key: dict[str, Any]):  # fmt: skip
        import torch

        os.environ.setdefault("WANDB_MODE", "disabled")
        require("sae_lens", "sae")
        self.states, self.settings, self.scratch, self.key = States(pool, backbone, layer, settings), settings, scratch, key
        self.backbone, self.layer, self.place = backbone, layer, (0, 0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.trainer = _trainer(settings, backbone, layer)

    def fit(self) -> None:
        """Train to the end, from the last checkpoint if there is one."""
        import torch

        from llmselect.engine.progress import Progress

        linalg: Any = torch.linalg
        self._resume()
        trainer, settings, last = self.trainer, self.settings, time.monotonic()
        progress = Progress("SAE", settings.steps, trainer.n_training_steps, unit="step")
        for epoch, row, states in self.states.buffers(*self.place):
            if trainer.activation_scaler.scaling_factor is None:
                length = float(linalg.vector_norm(states, dim=1).mean())
                trainer.activation_scaler.scaling_factor = states.shape[1] ** 0.5 / length
            full = states[: len(states) // settings.batch_tokens * settings.batch_tokens]
            for batch in torch.split(full, settings.batch_tokens):
                if trainer.n_training_steps == settings.steps:
                    progress.close()
                    return
                loss = float(trainer.step(batch).loss.detach())
                if not np.isfinite(loss):
                    raise LlmselectError(f"SAE training diverged at step {trainer.n_training_steps + 1}; lower sae.learning_rate")
                trainer.n_training_steps += 1
                progress.step(1, len(batch))
            self.place = epoch, row
            if time.monotonic() - last > CHECKPOINT_SECONDS:
                self._checkpoint()
                last = time.monotonic()

    def _tensors(self) -> dict[str, torch.Tensor]:
        trainer: Any = self.trainer
        found: dict[str, torch.Tensor] = {}
        for name, parameter in trainer.sae.named_parameters():
            found[f"sae.{name}"] = parameter.data
            found |= {f"adam.{name}.{k}": v for k, v in trainer.optimizer.state.get(parameter, {}).items()}
        found |= {f"buffer.{name}": value for name, value in trainer.sae.named_buffers()}
        return {**found, "fired": trainer.act_freq_scores, "silent": trainer.n_forward_passes_since_fired}

    def _checkpoint(self) -> None:
        from safetensors.torch import save

        trainer = self.trainer
        about = {"key": self.key, "place": list(self.place), "steps": trainer.n_training_steps,
                 "samples": trainer.n_training_samples, "active": trainer.n_frac_active_samples,
                 "scale": trainer.activation_scaler.scaling_factor}  # fmt: skip
        plain = {name: value.detach().cpu().contiguous() for name, value in self._tensors().items()}
        atomic.write_bytes(self.scratch / "state.safetensors", save(plain, {"about": json.dumps(about)}))

    def _resume(self) -> None:
        import safetensors

        untyped: Any = safetensors
        file, trainer = self.scratch / "state.safetensors", self.trainer
        if not file.exists():
            return
        with untyped.safe_open(file, "pt") as stored:
            about, names = json.loads(stored.metadata()["about"]), [*stored.keys()]
            if config.difference(about["key"], json.loads(json.dumps(self.key))):
                log.info("SAE: %s is of another training; starting anew", file)
                return
            for name, parameter in trainer.sae.named_parameters():
                kept = [key for key in names if key.startswith(f"adam.{name}.")]
                moments = {key.rpartition(".")[2]: stored.get_tensor(key) for key in kept}
                if moments:
                    trainer.optimizer.state[parameter] = {
                        k: v if k == "step" else v.to(parameter.device) for k, v in moments.items()
                    }
            for name, value in self._tensors().items():
                if not name.startswith("adam."):
                    value.copy_(stored.get_tensor(name))
        self.place = tuple(about["place"])
        trainer.n_training_steps, trainer.n_training_samples = about["steps"], about["samples"]
        trainer.n_frac_active_samples, trainer.activation_scaler.scaling_factor = about["active"], about["scale"]
        for _ in range(about["steps"]):  # schedules hold no more than the number of their steps
            trainer.lr_scheduler.step()
            for schedule in trainer.coefficient_schedulers.values():
                schedule.step()
        log.info("SAE: going on at step %d of %d", about["steps"], self.settings.steps)

    def save(self, out: Path, seconds: float) -> SaeReport:
        """Write the SAE and what it reaches on the held-out rows."""
        import shutil

        import torch

        from llmselect.sae.load import Unexplained, load

        trainer = self.trainer
        dead = int(trainer.dead_neurons.sum())
        trainer.sae.fold_activation_norm_scaling_factor(trainer.activation_scaler.scaling_factor)
        with atomic.replace_dir(out) as beside:
            trainer.sae.save_inference_model(str(beside))
            cfg = beside / "cfg.json"  # sae-lens writes it in the order of a set, another one in every process
            atomic.write_json(cfg, atomic.read_json(cfg, "run again"))
            sae, states = load(str(beside), device=str(self.backbone.device)), self.states.of(self.states.held_out)
            unexplained, fired = Unexplained(), 0
            for part in torch.split(states, 4096):
                unexplained.add(sae, part)
                fired += int((sae.encode(part) > 0).sum())
            report = SaeReport(round(unexplained.value, 6), round(fired / len(states), 3), dead, sae.cfg.d_sae,
                               trainer.n_training_samples, round(seconds, 1))  # fmt: skip
            digests = {f.name: atomic.sha256_file(f) for f in sorted(beside.iterdir())}
            atomic.write_sealed(beside / "training.json", {"key": self.key, "report": asdict(report), "sha256": digests})
        shutil.rmtree(self.scratch, ignore_errors=True)
        log.info("SAE: %s", report.describe())
        return report


def _trainer(settings: SaeTraining, backbone: Backbone, layer: int) -> Any:
    """A `sae_lens.SAETrainer` that is stepped from outside."""
    import sae_lens
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes.sae import SAEMetadata
    from sae_lens.training.sae_trainer import SAETrainer

    from llmselect.sae.load import hook_of

    device, steps = str(backbone.device), settings.steps
    metadata = SAEMetadata(
        model_name=Path(backbone.path).name, hook_name=hook_of(layer), context_size=backbone.encoder.max_length
    )
    shape: dict[str, Any] = {
        "d_in": backbone.hidden_size, "d_sae": settings.expansion * backbone.hidden_size, "k": settings.k, "dtype": "float32",
        "device": device, "normalize_activations": "expected_average_only_in", "metadata": metadata,
    }  # fmt: skip
    if settings.kind == "topk":
        sae = sae_lens.TopKTrainingSAE(sae_lens.TopKTrainingSAEConfig(**shape))
    else:
        # The threshold that replaces top-k afterwards is a running mean: in a short training it must move faster.
        sae = sae_lens.BatchTopKTrainingSAE(
            sae_lens.BatchTopKTrainingSAEConfig(**shape, topk_threshold_lr=min(0.5, max(0.01, 20 / steps)))
        )
    cfg = SAETrainerConfig(
        total_training_samples=steps * settings.batch_tokens, train_batch_size_samples=settings.batch_tokens,
        lr=settings.learning_rate, lr_end=settings.learning_rate / 10, lr_warm_up_steps=min(100, steps // 10),
        lr_decay_steps=steps // 5, device=device, dead_feature_window=max(1, steps // 10),
    )  # fmt: skip
    return SAETrainer(cfg=cfg, sae=sae, data_provider=iter(()))
