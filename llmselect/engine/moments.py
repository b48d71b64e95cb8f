"""Warm-up checkpoints: LoRA adapters with the state of their optimizer, and the step that Adam would take next."""

from __future__ import annotations

# torch and safetensors have types in part.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
import json
import re
import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmselect.errors import LlmselectError, UsageError

if TYPE_CHECKING:
    from llmselect.engine.backbone import Backbone

OPTIMIZER, STATE = "optimizer.safetensors", "state.json"


@dataclass(frozen=True, eq=False)
class Moments:
    """AdamW's state at a checkpoint: `first`, `second` by layer name, steps taken, β, ε."""

    first: Mapping[str, torch.Tensor]
    second: Mapping[str, torch.Tensor]
    taken: int
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    reference: bool = False

    def step(self, layer: str, gradient: torch.Tensor) -> torch.Tensor:
        """The direction of the next update for gradients `[B, d_out, d_in]`:

        m̂ = (β₁m + (1-β₁)g) / (1-β₁ᵗ), v̂ = (β₂v + (1-β₂)g²) / (1-β₂ᵗ), Γ = m̂ / (√v̂ + ε); `reference` is what the
        published code of LESS computes: no bias correction, ε inside the root.
        """
        (b1, b2), t = self.betas, self.taken + 1
        m, v = self.first[layer], self.second[layer]
        numerator = gradient.mul(1 - b1).add_(m, alpha=b1)
        second = gradient.square_().mul_(1 - b2).add_(v, alpha=b2)
        if self.reference:
            return numerator.div_(second.add_(self.epsilon).sqrt_())
        root = second.div_(1 - b2**t).sqrt_().add_(self.epsilon)
        return numerator.div_(1 - b1**t).div_(root)


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """An adapter loaded under `adapter`, the mean learning rate of its part of the warm-up, its optimizer state."""

    adapter: str
    learning_rate: float = 1.0
    moments: Moments | None = field(default=None)


def canonical(parameter: str) -> str:
    """A LoRA parameter's layer: `base_model.model.X.lora_A.default.weight` → `X.lora_A`."""
    name = parameter.removeprefix("base_model.model.").removesuffix(".weight")
    return re.sub(r"(lora_[AB])\.[^.]+$", r"\1", name)


def save(folder: Path, model: Any, optimizer: Any, step: int, learning_rate: float) -> None:
    """Write a checkpoint during training: the adapter, the optimizer's state by parameter name, the mean learning rate."""
    from safetensors.torch import save_file

    model.save_pretrained(folder, safe_serialization=True)
    (folder / "README.md").unlink(missing_ok=True)
    optimizer = getattr(optimizer, "optimizer", optimizer)  # Accelerate wraps it
    tensors = dict[str, torch.Tensor]()
    for name, parameter in model.named_parameters():
        for key in ("exp_avg", "exp_avg_sq"):
            if key in optimizer.state.get(parameter, {}):
                tensors[f"{canonical(name)}.{key}"] = optimizer.state[parameter][key].float().cpu().contiguous()
    if not tensors:
        raise UsageError(f"train.checkpoints: {type(optimizer).__name__} keeps no moments; use an Adam optimizer")
    save_file(tensors, folder / OPTIMIZER)
    group = optimizer.param_groups[0]
    about = {"step": step, "learning_rate": learning_rate, "betas": list(group["betas"]), "epsilon": group["eps"]}
    (folder / STATE).write_text(json.dumps(about))


def folders(path: str) -> list[Path]:
    """The checkpoints in a folder, in order: ours (`checkpoints/<step>`), a Trainer's (`checkpoint-<step>`), or itself."""
    root = Path(path)
    found = [p.parent for p in (*root.glob("checkpoints/*/adapter_config.json"), *root.glob("checkpoint-*/adapter_config.json"))]
    if not found and (root / "adapter_config.json").exists():
        found = [root]
    if not found:
        raise UsageError(f"checkpoints: {path} holds no adapter; give the folder of a warm-up that kept checkpoints")
    return sorted(found, key=lambda p: int("".join(c for c in p.name if c.isdigit()) or 0))


def load(backbone: Backbone, places: list[Path], adam: bool, reference: bool) -> list[Checkpoint]:
    """Load checkpoints as adapters of the model (none active yet).

    Errors: `UsageError` without checkpoints, or without optimizer state where `adam` needs it.
    """
    made = list[Checkpoint]()
    for i, folder in enumerate(places):
        name = f"checkpoint{i}"
        with warnings.catch_warnings():  # PEFT warns of several adapters: here they are the point
            warnings.simplefilter("ignore", UserWarning)
            backbone.causal_lm.load_adapter(str(folder), adapter_name=name)
        about = json.loads((folder / STATE).read_text()) if (folder / STATE).exists() else _trainer_state(folder)
        moments = _moments(backbone, folder, name, about, reference) if adam else None
        made.append(Checkpoint(name, float(about["learning_rate"]), moments))
    _freeze(backbone)
    return made


def fresh(backbone: Backbone, rank: int, seed: int, pattern: str) -> list[Checkpoint]:
    """A new LoRA adapter, for gradients without a warm-up (B is zero, so only B has a gradient)."""
    from peft import LoraConfig

    blocks: Any = backbone.blocks
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        targets = sorted({name.rpartition(".")[2] for name, m in blocks.named_modules()
                          if isinstance(m, torch.nn.Linear) and re.search(pattern, name)})  # fmt: skip
        if not targets:
            raise UsageError(f"layers: no linear layer of the blocks matches {pattern!r}")
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, lora_dropout=0.0)
        backbone.causal_lm.add_adapter(config, adapter_name="checkpoint0")
    _freeze(backbone)
    return [Checkpoint("checkpoint0")]


def activate(backbone: Backbone, checkpoint: Checkpoint) -> None:
    """Make one adapter the active one, everything frozen, dropout off."""
    backbone.causal_lm.set_adapter(checkpoint.adapter)
    _freeze(backbone)


@contextmanager
def at(backbone: Backbone, checkpoint: Checkpoint | None) -> Generator[None]:
    """The model as it was at a checkpoint; None: without any adapter."""
    if checkpoint is not None:
        activate(backbone, checkpoint)
        yield
        return
    backbone.causal_lm.disable_adapters()
    try:
        yield
    finally:
        backbone.causal_lm.enable_adapters()


def _freeze(backbone: Backbone) -> None:
    backbone.causal_lm.eval().requires_grad_(False)  # new adapters start in training mode


def _trainer_state(folder: Path) -> dict[str, Any]:
    """Mean learning rate of the last epoch before the checkpoint, from a Trainer's log."""
    file = folder / "trainer_state.json"
    if not file.exists():
        return {"learning_rate": 1.0}
    about = json.loads(file.read_text())
    logs = [one for one in about.get("log_history", []) if "learning_rate" in one]
    rates = [one["learning_rate"] for one in logs if one.get("epoch", 0) > about.get("epoch", 0) - 1]
    return {"learning_rate": sum(rates) / len(rates) if rates else 1.0}


def _moments(backbone: Backbone, folder: Path, adapter: str, about: Mapping[str, Any], reference: bool) -> Moments:
    from safetensors.torch import load_file

    if (folder / OPTIMIZER).exists():
        # Read on the CPU: among several processes a device is called cpu:0, which safetensors does not know.
        stored = {name: value.to(backbone.device) for name, value in load_file(folder / OPTIMIZER).items()}
        first = {k.removesuffix(".exp_avg"): v for k, v in stored.items() if k.endswith(".exp_avg")}
        second = {k.removesuffix(".exp_avg_sq"): v for k, v in stored.items() if k.endswith(".exp_avg_sq")}
        return Moments(first, second, int(about["step"]), tuple(about["betas"]), float(about["epsilon"]), reference)
    if (folder / "optimizer.pt").exists():
        return _trainer_moments(backbone, folder / "optimizer.pt", adapter, reference)
    raise UsageError(f"checkpoints: {folder} has no optimizer state; use preconditioner: none, or warm up with train.checkpoints")


def _trainer_moments(backbone: Backbone, file: Path, adapter: str, reference: bool) -> Moments:
    """A Trainer numbers its parameters in the order of the model's trainable ones."""
    state = torch.load(file, map_location=backbone.device, weights_only=True)
    order = [number for group in state["param_groups"] for number in group["params"]]
    layers = [(name, p) for name, p in backbone.causal_lm.named_parameters() if re.search(rf"lora_[AB]\.{adapter}\.", name)]
    if len(order) != len(layers):
        raise LlmselectError(f"{file} has state for {len(order)} parameters, the adapter has {len(layers)}")
    first, second = dict[str, torch.Tensor](), dict[str, torch.Tensor]()
    for number, (name, parameter) in zip(order, layers, strict=True):
        one = state["state"][number]
        if one["exp_avg"].shape != parameter.shape:
            raise LlmselectError(f"{file}: parameter {number} is {tuple(one['exp_avg'].shape)}, {name} {tuple(parameter.shape)}")
        first[canonical(name)], second[canonical(name)] = one["exp_avg"].float(), one["exp_avg_sq"].float()
    group = state["param_groups"][0]
    taken = int(state["state"][order[0]]["step"])
    return Moments(first, second, taken, tuple(group["betas"]), float(group["eps"]), reference)
