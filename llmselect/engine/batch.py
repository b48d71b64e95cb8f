"""Batches of rows of like length under a token budget, and what a pass knows about each of their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from llmselect.chat import Encoded
    from llmselect.engine.backbone import Backbone
    from llmselect.engine.head import TokenStats


def plan(lengths: Sequence[int] | np.ndarray, batch_tokens: int) -> list[np.ndarray]:
    """Row numbers in batches of at most `batch_tokens` padded tokens (a longer row goes alone).

    Longest first: if memory is short, it shows at the start. The plan depends on the lengths alone, so every launch
    makes the same batches.
    """
    lengths = np.asarray(lengths)
    order = np.argsort(-lengths, kind="stable")
    batches, start = list[np.ndarray](), 0
    while start < len(order):
        longest = max(int(lengths[order[start]]), 1)
        size = max(1, batch_tokens // longest)
        batches.append(order[start : start + size])
        start += size
    return batches


@dataclass(frozen=True, eq=False)
class Batch:
    """`B` padded rows of `T` tokens and, lazily, their hidden states and token losses.

    `ids [B, T]`; `mask [B, T]` real tokens; `response [B, T]` supervised tokens; `content [B, T]`: 0 template or
    special, 1 prompt text, 2 response text; `cut [B, 2]` prompt and response tokens lost to the length limit. `view` is
    the sequence the rows were made from (`row` or `response`), `side` whose rows they are (`pool` or `target`), `names` their
    ids in a pass over a dataset.
    """

    backbone: Backbone
    ids: torch.Tensor
    mask: torch.Tensor
    response: torch.Tensor
    content: torch.Tensor
    cut: torch.Tensor
    view: str = "row"
    side: str = "pool"
    names: Sequence[str] = ()
    layers: tuple[int, ...] = (-1,)
    _kept: dict[int, torch.Tensor] = field(default_factory=dict[int, torch.Tensor], repr=False)

    def hidden(self, layer: int = -1) -> torch.Tensor:
        """Hidden states `[B, T, d]`, all declared layers from the one forward of this batch."""
        if not self._kept:
            self._kept.update(self.backbone.states(self.ids, self.mask, self.layers))
        return self._kept[self.backbone.layer(layer)]

    @cached_property
    def stats(self) -> TokenStats:
        """Loss, entropy, margin and EL2N of each supervised token, from the same forward."""
        from llmselect.engine.head import token_stats

        return token_stats(self.backbone, self.hidden(-1), self.ids, self.response)

    def measured(self) -> TokenStats:
        """The same from a forward of its own, for a model that has changed since."""
        from llmselect.engine.head import token_stats

        states = self.backbone.states(self.ids, self.mask, (-1,))[self.backbone.depth]
        return token_stats(self.backbone, states, self.ids, self.response)

    def scope(self, name: str, template: bool = False) -> torch.Tensor:
        """`[B, T]` bool: tokens of `all`, `prompt` or `response`; with `template`, marks and special tokens too."""
        if name == "all":
            return self.mask if template else self.content > 0
        if name == "response":
            return self.response if template else self.content == 2
        return self.mask & ~self.response if template else self.content == 1


def collate(backbone: Backbone, rows: Sequence[Encoded], layers: tuple[int, ...] = (-1,), view: str = "row",
            padding_side: str = "right") -> Batch:  # fmt: skip
    """Pad encoded rows into one batch on the backbone's device."""
    longest = max((len(row.ids) for row in rows), default=0)
    ids = np.full((len(rows), longest), backbone.pad, np.int64)
    mask, response = np.zeros((2, len(rows), longest), bool)
    content = np.zeros((len(rows), longest), np.int8)
    for i, row in enumerate(rows):
        at = slice(0, len(row.ids)) if padding_side == "right" else slice(longest - len(row.ids), longest)
        ids[i, at], mask[i, at], response[i, at], content[i, at] = row.ids, True, row.response, row.content
    cut = np.array([(row.prompt_cut, row.response_cut) for row in rows], np.int64).reshape(-1, 2)
    tensors = [torch.as_tensor(a).to(backbone.device) for a in (ids, mask, response, content, cut)]
    return Batch(backbone, *tensors, view=view, layers=layers)
