"""Row embeddings from the hidden states of a causal LM.

Paper: RDS+ of Ivison et al., "Large-Scale Data Selection for Instruction Tuning", arXiv 2503.01807, section 2 (pooling
    `weighted`, layer -1).
Objective: with hidden states h_t of the kept tokens, t = 1 … T counted over kept tokens:
    `mean` e = Σ_t h_t / T; `last` e = h_T; `weighted` e = Σ_t t·h_t / Σ_t t. Then e / ‖e‖₂ if `normalize`.
Inputs: a causal LM; rows through its chat template.
Cost: one forward up to `layer`; 2·d bytes a row.
Deviations: the mask is applied before weighting, so padding cannot enter (the released code of some baselines forgets
    it); rows are stored with unit length, which cosine ignores and half precision needs (states of middle layers can
    pass 65,504).
Defaults: `weighted`, last layer, every token of the row with its chat marks, as RDS+ does.
Use: the dense feature for `similarity`, clusters, `dedup:` and the map of the report.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

from llmselect.engine.extractor import Arrays, Extractor, State
from llmselect.registry import extractors

if TYPE_CHECKING:
    import torch

    from llmselect.engine.backbone import Backbone
    from llmselect.engine.batch import Batch


@extractors.register("embedding")
@dataclass(frozen=True, kw_only=True)
class Embedding(Extractor):
    """Array `value [n, d]` float16."""

    pooling: Literal["mean", "last", "weighted"] = field(default="weighted", metadata={"help": "see Objective"})
    layer: int = field(default=-1, metadata={"help": "hidden state, 0 embeddings … -1 after the last norm"})
    scope: Literal["all", "prompt", "response"] = field(default="all", metadata={"help": "which tokens are kept"})
    template: bool = field(default=True, metadata={"help": "keep chat marks and special tokens too"})
    normalize: bool = field(default=True, metadata={"help": "unit length"})

    def layers(self, state: State = MappingProxyType({})) -> tuple[int, ...]:
        return (self.layer,)

    def arrays(self, backbone: Backbone, groups: Sequence[str]) -> Arrays:
        backbone.layer(self.layer)
        return {"value": ("float16" if self.normalize else "float32", (backbone.hidden_size,))}

    def rows(self, batch: Batch, state: State) -> dict[str, torch.Tensor]:
        import torch

        kept = batch.scope(self.scope, self.template)
        position = kept.long().cumsum(1)
        if self.pooling == "weighted":
            weight = position * kept
        elif self.pooling == "last":
            weight = kept & (position == position[:, -1:])
        else:
            weight = kept
        hidden = batch.hidden(self.layer)
        # One [1, T] × [T, d] product per row reads the states once; fp32 weights: bf16 cannot count past 256.
        weight = weight.float() / weight.sum(1, keepdim=True)
        pooled = torch.bmm(weight[:, None], hidden.float())[:, 0]
        return {"value": torch.nn.functional.normalize(pooled, dim=-1) if self.normalize else pooled}
