"""Token counts of each row: what it costs to train on.

Paper: none; bookkeeping.
Objective: `total` tokens after truncation, `supervised` tokens (assistant turns and their end marks), `text` tokens of
    assistant turns without any mark, and how many tokens of prompt and response the length limit removed.
Inputs: the tokenizer and its chat template; no weights are loaded.
Cost: tokenisation; 20 bytes a row.
Deviations: none.
Defaults: `max_length` of the model, at most 2048.
Use: every run has it: what budgets in tokens and equal training are counted in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from llmselect.engine.extractor import Arrays, Extractor, State
from llmselect.registry import extractors

if TYPE_CHECKING:
    import torch

    from llmselect.engine.backbone import Backbone
    from llmselect.engine.batch import Batch


@extractors.register("tokens")
@dataclass(frozen=True, kw_only=True)
class Tokens(Extractor):
    """Arrays `total`, `supervised`, `text`, `prompt_cut`, `response_cut`, each `[n]` int32."""

    def layers(self, state: State = MappingProxyType({})) -> tuple[int, ...]:
        return ()

    def arrays(self, backbone: Backbone, groups: Sequence[str]) -> Arrays:
        return {key: ("int32", ()) for key in ("total", "supervised", "text", "prompt_cut", "response_cut")}

    def rows(self, batch: Batch, state: State) -> dict[str, torch.Tensor]:
        return {
            "total": batch.mask.sum(1),
            "supervised": batch.response.sum(1),
            "text": (batch.content == 2).sum(1),
            "prompt_cut": batch.cut[:, 0],
            "response_cut": batch.cut[:, 1],
        }
