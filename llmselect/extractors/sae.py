"""Monosemantic activations: mean sparse-autoencoder latents of a row.

Paper: MONA, arXiv 2503.15573 v2, section 3.
Objective: z_s = mean_t SAE.encode(h_t) over the tokens t of a row, h_t the hidden state that the SAE was trained on.
    No sparsifying again, no normalising.
Inputs: a causal LM and an SAE of one of its layers: a public release of sae-lens, a folder, or one trained by the
    recipe's `sae:` section. The target rows settle which hidden state it reads.
Cost: the forward up to that layer and one encode per token, shared with other features of the pass; 6 bytes per
    non-zero latent.
Deviations: where the paper is silent: prompt and response tokens, without special and chat-template tokens; states
    encoded in fp32. `top` keeps only the largest latents of a row, an approximation.
Defaults: scope `all`, every latent.
Use: `mona`; tags for `instag`, `mig` and `mass` where there are no others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from llmselect.engine.extractor import Arrays, Extractor, State
from llmselect.errors import UsageError
from llmselect.registry import extractors
from llmselect.sae import load

if TYPE_CHECKING:
    import torch

    from llmselect.engine.backbone import Backbone
    from llmselect.engine.batch import Batch


@lru_cache(maxsize=4)
def _depth(model: str) -> int:
    """Decoder blocks of a model."""
    from llmselect.engine.backbone import Backbone

    return Backbone(model).depth


CHUNK = 1 << 24  # latents [tokens, width] held at a time


@extractors.register("sae")
@dataclass(frozen=True, kw_only=True)
class Sae(Extractor):
    """Array `value [n, width]` float16, sparse."""

    fits = True

    sae: str = field(default="trained", metadata={"help": "folder or sae-lens release; `trained`: by this recipe"})
    sae_id: str | None = field(default=None, metadata={"help": "the SAE of a release, e.g. layer_12/width_16k/canonical"})
    layer: int | None = field(default=None, metadata={"help": "hidden state that it reads; null: measured"})
    scope: Literal["all", "prompt", "response"] = field(default="all", metadata={"help": "tokens averaged"})
    template: bool = field(default=False, metadata={"help": "also special and chat-template tokens"})
    top: int | None = field(default=None, metadata={"help": "keep only the largest latents of a row; null: all"})
    max_fvu: float | None = field(default=0.9, metadata={"help": "refuse an SAE that leaves more variance unexplained"})

    def __post_init__(self) -> None:
        if self.top is not None and self.top < 1:
            raise UsageError(f"top: {self.top} must be at least 1")

    def _sae(self, device: Any = "cpu") -> Any:
        if self.sae == "trained":
            raise UsageError("sae: give a folder or a release; `trained` needs a recipe with a sae: section")
        return load.load(self.sae, self.sae_id, str(device))

    def settings(self) -> dict[str, Any]:
        told = {key: value for key, value in super().settings().items() if key not in ("sae", "sae_id")}
        return {**told, "sae": load.digest(self._sae())}

    def layers(self, state: State = MappingProxyType({})) -> tuple[int, ...]:
        if "layer" in state:
            return (int(state["layer"]),)
        return load.candidates(self._sae(), self.layer, _depth(self.model))

    def arrays(self, backbone: Backbone, groups: Sequence[str]) -> Arrays:
        sae = self._sae()
        if sae.cfg.d_in != backbone.hidden_size:
            wide = backbone.hidden_size
            raise UsageError(f"sae: it reads states of {sae.cfg.d_in} numbers, those of {self.model} have {wide}")
        return {"value": ("csr:float16", (sae.cfg.d_sae,))}

    def fit(self, backbone: Backbone, batches: Mapping[str, list[Batch]]) -> dict[str, torch.Tensor]:
        import torch

        sae = self._sae(backbone.device)
        measured = {layer: load.Unexplained() for layer in self.layers()}
        for batch in (one for rows in batches.values() for one in rows):
            keep = batch.scope(self.scope, self.template)
            for layer, unexplained in measured.items():
                unexplained.add(sae, batch.hidden(layer)[keep])
        found = {layer: one.value for layer, one in measured.items()}
        best = load.choose_layer(self.sae, found, self.max_fvu)
        return {"layer": torch.tensor(best), "fvu": torch.tensor(found[best])}

    def rows(self, batch: Batch, state: State) -> dict[str, torch.Tensor]:
        import torch

        sae, keep = self._sae(batch.backbone.device), batch.scope(self.scope, self.template)
        states, counts = batch.hidden(int(state["layer"]))[keep], keep.sum(1)
        row = torch.repeat_interleave(torch.arange(len(counts), device=states.device), counts)
        total = torch.zeros(len(counts), sae.cfg.d_sae, device=states.device)
        size = max(1, CHUNK // sae.cfg.d_sae)
        for part, rows in zip(torch.split(states, size), torch.split(row, size), strict=True):
            total.index_add_(0, rows, sae.encode(part.float()).float())
        value = total / counts[:, None]
        if self.top is not None and self.top < value.shape[1]:
            least = value.topk(self.top, dim=1).values[:, -1:]
            value = value.where(value >= least, 0)
        return {"value": value}
