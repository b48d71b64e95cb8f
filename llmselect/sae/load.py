"""Sparse autoencoders by sae-lens: releases by name, folders on disk; and which hidden state of the model they read.

A hook's name does not settle that: releases disagree whether "layer i" means the input or the output of block i. Both
are tried on text, and the one that the SAE reconstructs is taken.
"""

from __future__ import annotations

# sae-lens has no types.
# pyright: reportMissingTypeStubs=false
import hashlib
import logging
import os
import re
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmselect.errors import LlmselectError, UsageError, require

if TYPE_CHECKING:
    import torch

log = logging.getLogger("llmselect")
# Names of one residual stream: TransformerLens's, Hugging Face's modules, and bare layers.
_OUTPUT = re.compile(r"(?:blocks\.(\d+)\.hook_resid_post|(?:model|transformer|gpt_neox)\.(?:layers|h)\.(\d+)|layers\.(\d+))")
_INPUT = re.compile(r"blocks\.(\d+)\.hook_resid_pre")


@lru_cache(maxsize=4)
def load(path: str, sae_id: str | None = None, device: str = "cpu") -> Any:
    """The `sae_lens.SAE` in a folder (sae-lens's or sparsify's format), or `sae_id` of a public release called `path`.

    Errors: `UsageError` when there is none; `MissingExtra` without sae-lens.
    """
    os.environ.setdefault("WANDB_MODE", "disabled")  # sae-lens imports it, nothing here reports to it
    device = "cpu" if device.startswith("cpu") else device  # several processes say cpu:0, which safetensors does not know
    lens = require("sae_lens", "sae")
    try:
        if (folder := Path(path)).is_dir():
            options: dict[str, Any] = {}
            if (folder / "sae.safetensors").exists():
                options["converter"] = _sparsify
            sae = lens.SAE.load_from_disk(folder, device=device, dtype="float32", **options)
        elif sae_id is None:
            raise UsageError(f"sae: {path} is no folder; of a public release give sae: RELEASE and sae_id: ID")
        else:
            sae = lens.SAE.from_pretrained(path, sae_id, device=device, dtype="float32")
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(f"sae: cannot read {path!r}{f' ({sae_id})' if sae_id else ''}: {first}") from error
    return sae.eval().requires_grad_(False)


def _sparsify(path: Any, device: str = "cpu",
              cfg_overrides: dict[str, Any] | None = None) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:  # fmt: skip
    """sae-lens's reader of sparsify folders, which takes the decoder for its transpose."""
    from sae_lens.loading.pretrained_sae_loaders import sparsify_disk_loader

    config, weights = sparsify_disk_loader(path, device, cfg_overrides)
    if weights["W_dec"].shape != (config["d_sae"], config["d_in"]):
        weights["W_dec"] = weights["W_dec"].T.contiguous()
    return config, weights


def digest(sae: Any) -> str:
    """SHA-256 of the weights, the same wherever they were read from."""
    import torch

    total = hashlib.sha256(type(sae).__name__.encode())
    for name, tensor in sorted(sae.state_dict().items()):
        total.update(name.encode() + tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def hook_of(hidden_state: int) -> str:
    """The hook name of a Hugging Face hidden state: state i > 0 is the output of block i - 1."""
    return f"blocks.{hidden_state - 1}.hook_resid_post" if hidden_state else "blocks.0.hook_resid_pre"


def hidden_state_of(hook: str) -> int:
    """The Hugging Face hidden state that a hook's name means, taken literally.

    Errors: `UsageError` for a place that is no residual stream (attention or MLP outputs).
    """
    if match := _INPUT.fullmatch(hook):
        return int(match[1])
    if match := _OUTPUT.fullmatch(hook):
        return int(next(part for part in match.groups() if part)) + 1
    raise UsageError(f"sae: it reads {hook!r}, which is not the residual stream; give layer:, the hidden state it reads")


def candidates(sae: Any, layer: int | None, depth: int) -> tuple[int, ...]:
    """The hidden states that the SAE may read: `layer` if given, else its hook's and the ones off by one."""
    if layer is not None:
        return (layer,)
    hook = sae.cfg.metadata.hook_name
    if not hook:
        raise UsageError("sae: its config names no hook; give layer:, the hidden state it reads")
    literal = hidden_state_of(hook)
    # The last hidden state of Hugging Face is taken after the norm: no SAE reads that one.
    found = tuple(i for i in (literal - 1, literal, literal + 1) if 0 <= i < depth)
    if not found:
        raise UsageError(f"sae: its hook {hook!r} is beyond the {depth} blocks of this model")
    return found


class Unexplained:
    """Fraction of variance unexplained, Σ‖x - SAE(x)‖² / Σ‖x - x̄‖², over states added in parts."""

    def __init__(self) -> None:
        self.error, self.square, self.total, self.count = 0.0, 0.0, None, 0

    def add(self, sae: Any, states: torch.Tensor) -> None:
        """Add states `[N, d]`."""
        import torch

        states = states.float()
        with torch.inference_mode():
            self.error += float((states - sae(states)).double().square().sum())
        double = states.double()
        self.square += float(double.square().sum())
        self.total = double.sum(0) + (0 if self.total is None else self.total)
        self.count += len(states)

    @property
    def value(self) -> float:
        """NaN before anything was added."""
        if self.total is None or not self.count:
            return float("nan")
        return self.error / max(self.square - float(self.total.square().sum()) / self.count, 1e-30)


def choose_layer(name: str, found: dict[int, float], limit: float | None) -> int:
    """The hidden state with the least variance unexplained, `found` by state.

    Errors: `LlmselectError` when even that is above `limit`: the SAE belongs to another model or layer.
    """
    best = min(found, key=lambda layer: (found[layer], layer))
    told = ", ".join(f"{value:.2f} at hidden state {layer}" for layer, value in found.items())
    if limit is not None and not found[best] <= limit:
        raise LlmselectError(
            f"SAE {name} does not reconstruct this model's states: {told} of the variance unexplained, more than "
            f"{limit}. It was trained on another model or layer; give layer: if you know it"
        )
    log.info("SAE %s: variance unexplained %s; reading hidden state %d", name, told, best)
    return best
