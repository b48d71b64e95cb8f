"""Gradient features: the direction in which a row would move the model, sketched.

Paper: LESS, Xia et al., arXiv 2402.04333, sections 2 to 4 (mode `lora` on warm-up checkpoints); norms: GraNd, Paul et
    al., arXiv 2107.07075; of the loss by the input: AIGN of EasyCore, Ramesh et al., arXiv 2510.11018.
Objective: per checkpoint i the gradient of the row's mean response loss, for pool rows as the direction Γ of Adam's next
    step (`preconditioner: adam`), for target rows plain; a feature row is the concatenation of √η̄_i · unit(sketch), η̄
    the checkpoints' mean learning rates scaled to sum 1, so that one cosine is Σ_i η̄_i cos(Γ_i(z), ∇_i(z')).
    `preconditioner: ekfac` instead multiplies target gradients by the inverse EK-FAC Fisher of pool rows. `norm` is GraNd at each
    checkpoint; AIGN is the mean over checkpoints of `input_norm`, of which EasyCore keeps the smallest.
Inputs: a causal LM; for LESS a warm-up whose checkpoints were kept (`checkpoints: warmup`). Rows without response tokens
    have no gradient and are set aside.
Cost: one forward and one backward to activations per checkpoint, no weight gradients, the LM head on responses only;
    `dim` bytes a row and checkpoint in int8.
Deviations: Adam's own formula, with bias correction and ε outside the root; `reference: true` is the published code's.
    The sketch is one-sided (mode `base`) plus a fold instead of a dense Rademacher matrix. Without a checkpoint, mode
    `lora` takes a new adapter, whose A has no gradient yet. AIGN is over the checkpoints that are kept, not every epoch, and
    at the states that enter the lowest block, where the paper has pixels.
Defaults: mode `base`, k = 64, dim 8192, int8.
Use: LESS, TAROT, TAGCOS, and norms as scores: where a backward pass per checkpoint is affordable.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary

from llmselect.engine.extractor import Arrays, Extractor, State
from llmselect.errors import UsageError
from llmselect.registry import extractors

if TYPE_CHECKING:
    import torch

    from llmselect.engine.backbone import Backbone
    from llmselect.engine.batch import Batch
    from llmselect.engine.moments import Checkpoint
    from llmselect.engine.projection import Projection

_READY: WeakKeyDictionary[Any, list[tuple[Checkpoint | None, Projection]]] = WeakKeyDictionary()


@extractors.register("gradient")
@dataclass(frozen=True, kw_only=True)
class Gradient(Extractor):
    """Arrays `value [n, checkpoints · dim]` (int8: scaled per row, cosines are unchanged) and `norm [n, checkpoints]`
    float32, the length of each sketched gradient; `input_norm [n, checkpoints]` float32, ‖∂ loss / ∂ states‖ at the input of
    the lowest block with such a layer, over all its tokens; `loss [n]` float32 at the last checkpoint."""

    alone = True

    mode: Literal["base", "lora"] = field(default="base", metadata={"help": "gradients of the weights, or of a LoRA adapter"})
    checkpoints: str | None = field(default=None, metadata={"help": "folder of LoRA checkpoints; `warmup`: the recipe's"})
    use: Literal["all", "last"] = field(default="all", metadata={"help": "which of the checkpoints"})
    preconditioner: Literal["none", "adam", "ekfac"] = field(
        default="none", metadata={"help": "adam: pool rows as Adam's next step; ekfac: target rows times the inverse Fisher"}
    )
    reference: bool = field(default=False, metadata={"help": "Adam as the published code of LESS has it"})
    layers_like: str = field(default=".", metadata={"help": "regular expression on the names of linear layers"})
    last_blocks: int | None = field(default=None, metadata={"help": "only the last n decoder blocks"})
    k: int | None = field(default=64, metadata={"help": "rows that the larger side of a weight is projected to; null: exact"})
    dim: int | None = field(default=8192, metadata={"help": "numbers per row and checkpoint; null: no sketch (tiny models)"})
    rank: int = field(default=8, metadata={"help": "of the new adapter when there is no checkpoint"})
    fisher_rows: int = field(default=256, metadata={"help": "pool rows that ekfac's Fisher is estimated on"})
    damping: float = field(default=0.1, metadata={"help": "of ekfac, as a share of a layer's mean eigenvalue"})
    packed: bool = field(default=False, metadata={"help": "rows of a batch as one sequence without padding"})
    store: Literal["int8", "float16", "float32"] = "int8"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.preconditioner == "adam" and not (self.mode == "lora" and self.checkpoints):
            raise UsageError("preconditioner: adam needs mode: lora and checkpoints: with their optimizer state")
        if self.checkpoints and self.mode != "lora":
            raise UsageError("checkpoints: are LoRA adapters; give mode: lora")
        if self.preconditioner == "ekfac" and self.mode != "base":
            raise UsageError("preconditioner: ekfac is of the weights themselves; give mode: base")
        if self.damping <= 0:
            raise UsageError(f"damping: {self.damping} must be positive")
        for name in ("last_blocks", "k", "dim", "rank", "fisher_rows"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UsageError(f"{name}: {getattr(self, name)} must be at least 1")

    @property
    def fits(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride] - depends on the settings here
        return self.preconditioner == "ekfac"

    @property
    def sample_rows(self) -> int:
        return self.fisher_rows if self.fits else 0

    def fit(self, backbone: Backbone, batches: Mapping[str, list[Batch]],
            sample: Sequence[Batch] = ()) -> dict[str, torch.Tensor]:  # fmt: skip
        from llmselect.engine import ekfac

        return ekfac.factors(backbone, self._ready(backbone)[0][1].layers, sample, self.seed)

    def layers(self, state: State = MappingProxyType({})) -> tuple[int, ...]:
        return ()

    def settings(self) -> dict[str, Any]:
        told = super().settings()
        if not self.checkpoints:
            return told
        from llmselect.engine.backbone import weights_digest

        return {**told, "checkpoints": [weights_digest(str(folder)) for folder in self._places()]}

    def _places(self) -> list[Any]:
        from llmselect.engine.moments import folders

        found = folders(str(self.checkpoints))
        return found[-1:] if self.use == "last" else found

    def arrays(self, backbone: Backbone, groups: Sequence[str]) -> Arrays:
        ready = self._ready(backbone)
        width = sum(projection.width for _, projection in ready)
        return {"value": (self.store, (width,)), **dict.fromkeys(("norm", "input_norm"), ("float32", (len(ready),))),
                "loss": ("float32", ())}  # fmt: skip

    def _ready(self, backbone: Backbone) -> list[tuple[Checkpoint | None, Projection]]:
        """The checkpoints, loaded, each with its projection; once per pass."""
        if backbone not in _READY:
            from llmselect.engine import gradients, moments
            from llmselect.engine.projection import Projection

            if self.mode == "base":
                found: list[Checkpoint | None] = [None]
            elif self.checkpoints:
                found = [*moments.load(backbone, self._places(), self.preconditioner == "adam", self.reference)]
            else:
                found = [*moments.fresh(backbone, self.rank, self.seed, self.layers_like)]
            ready: list[tuple[Checkpoint | None, Projection]] = []
            for one in found:
                pattern = self.layers_like if one is None else rf"(?:{self.layers_like}).*lora_[AB]\.{one.adapter}$"
                layers = gradients.choose(backbone, pattern, self.last_blocks)
                k = self.k if one is None else None  # a LoRA matrix is small: its gradient stays exact, as Adam needs
                shape: dict[str, Any] = {"k": k, "dim": self.dim, "seed": self.seed, "device": backbone.device}
                ready.append((one, Projection(layers, **shape)))
            _READY[backbone] = ready
        return _READY[backbone]

    def rows(self, batch: Batch, state: State) -> dict[str, torch.Tensor]:
        import torch

        from llmselect.engine import gradients, moments

        parts, norms, inputs = list[torch.Tensor](), list[torch.Tensor](), list[torch.Tensor]()
        loss = torch.zeros(0)
        ready = self._ready(batch.backbone)
        rates: Any = torch.tensor([1.0 if one is None else one.learning_rate for one, _ in ready], dtype=torch.float64)
        for (one, projection), share in zip(ready, (rates / rates.sum()).sqrt().tolist(), strict=True):
            if one is not None:
                moments.activate(batch.backbone, one)
            step = one.moments if one is not None and batch.side == "pool" else None
            curvature = (state, self.damping) if self.fits and batch.side == "target" else None
            projection.start(len(batch.ids), step, curvature)
            at_input: list[Any] = [torch.zeros(len(batch.ids), 1, 1, device=batch.ids.device)]
            loss = gradients.row_gradients(batch.backbone, batch, projection.layers, projection.reduce, projection.sink,
                                           packed=self.packed, at_input=at_input.append)  # fmt: skip
            out: Any = projection.out
            norm = out.norm(dim=1, keepdim=True)
            parts.append(share * out / norm.clamp_min(1e-30))
            missing = loss.isnan().to(norm.device)[:, None]
            norms.append(norm.masked_fill(missing, float("nan")))
            inputs.append(at_input[-1].float().flatten(1).norm(dim=1, keepdim=True).masked_fill(missing, float("nan")))
        lengths = {"norm": torch.cat(norms, 1), "input_norm": torch.cat(inputs, 1)}
        return {"value": _stored(torch.cat(parts, 1), self.store), **lengths, "loss": loss}


def _stored(value: torch.Tensor, dtype: str) -> torch.Tensor:
    """Rows in their stored type; int8 uses the whole range of each row, which no cosine notices."""
    import torch

    if dtype != "int8":
        return value.to(getattr(torch, dtype))
    scale = value.abs().amax(1, keepdim=True).clamp_min(1e-30)
    return (value * (127 / scale)).round().to(torch.int8)
