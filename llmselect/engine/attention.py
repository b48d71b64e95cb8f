"""How sharply each token attends and how much attention it receives, without ever building `[L, H, T, T]`.

The statistics are taken inside the model's own forward by a registered attention function: the output comes from the
fused kernel, the probabilities are rebuilt from queries and keys in blocks of query rows and dropped at once.
"""

from __future__ import annotations

# transformers has types in part.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
from collections.abc import Generator, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch

from llmselect.errors import LlmselectError

if TYPE_CHECKING:
    from llmselect.engine.backbone import Backbone

NAME = "llmselect_attention_statistics"
BLOCK = 128  # query rows at a time: 64 to 128 measured faster than 256
_active: list[AttentionStatistics] = []

RowMap = Literal["normalized", "inverse"]


@dataclass
class AttentionStatistics:
    """Sums over the chosen layers; `row()` and `column()` are their means over layers and heads, `[B, T]`.

    Row signal of query i with visible keys V_i and entropy H_i = -Σ_j A_ij log A_ij:
    `normalized` 1 - H_i / log |V_i| (0 when |V_i| = 1); `inverse` 1 / (1 + H_i).
    Column signal of key j: the mean of A_ij over the queries i that see it.
    """

    layers: Set[int]
    mask: torch.Tensor  # [B, T] real tokens
    row_map: RowMap = "normalized"
    seen: set[int] = field(default_factory=set[int])
    row_sum: torch.Tensor | None = None
    column_sum: torch.Tensor | None = None

    def row(self) -> torch.Tensor:
        """Q before scaling, `[B, T]`."""
        return self._mean(self.row_sum)

    def column(self) -> torch.Tensor:
        """K before scaling, `[B, T]`."""
        return self._mean(self.column_sum)

    def _mean(self, total: torch.Tensor | None) -> torch.Tensor:
        if total is None or self.seen != self.layers:
            raise LlmselectError("the model did not pass its attention through the registered function")
        return total / len(self.seen)

    def add(self, layer: int, query: torch.Tensor, key: torch.Tensor, visible: torch.Tensor | None, scale: float,
            softcap: float | None) -> None:  # fmt: skip
        """Add one layer: `query [B, H, T, D]`, `key [B, H_kv, T, D]`, `visible [B, 1, T, T]` bool or None (causal)."""
        row, column = attention_sums(query, key, self.mask, visible, scale, softcap, self.row_map)
        self.row_sum = row if self.row_sum is None else self.row_sum + row
        self.column_sum = column if self.column_sum is None else self.column_sum + column
        self.seen.add(layer)


def attention_sums(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor, visible: torch.Tensor | None,
                   scale: float, softcap: float | None, row_map: RowMap) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Row and column signals of one layer, averaged over heads, `[B, T]` fp32 each."""
    batch, heads, length = query.shape[:3]
    key = key.repeat_interleave(heads // key.shape[1], dim=1).float()
    row = torch.zeros(batch, length, device=query.device)
    column, viewers = torch.zeros_like(row), torch.zeros_like(row)
    for start in range(0, length, BLOCK):
        stop = min(start + BLOCK, length)
        sees = _visible(mask, visible, start, stop, stop if visible is None else length)
        keys = sees.shape[-1]
        score = (query[:, :, start:stop].float() @ key[:, :, :keys].transpose(-1, -2)) * scale
        if softcap:
            score = torch.tanh(score / softcap) * softcap
        score = score.masked_fill(~sees[:, None], float("-inf"))
        log_sum = score.logsumexp(-1, keepdim=True)
        probability = (score - log_sum).exp_().nan_to_num_(0.0)  # rows of padding see nothing
        entropy = (log_sum - (probability * score.masked_fill(~sees[:, None], 0)).sum(-1, keepdim=True))[..., 0]
        count = sees.sum(-1).float()
        row[:, start:stop] = _row_signal(entropy, count[:, None], row_map).mean(1)
        real = mask[:, start:stop, None] & sees
        column[:, :keys] += (probability.mean(1) * real).sum(1)
        viewers[:, :keys] += real.sum(1)
    return row.masked_fill(~mask, 0), column / viewers.clamp_min(1)


def _visible(mask: torch.Tensor, visible: torch.Tensor | None, start: int, stop: int, keys: int) -> torch.Tensor:
    """`[B, rows, keys]`: the keys that each query of the block sees."""
    if visible is not None:
        return visible[:, 0, start:stop, :keys] & mask[:, None, :keys]
    query, key = torch.arange(start, stop, device=mask.device), torch.arange(keys, device=mask.device)
    return (key <= query[:, None]) & mask[:, None, :keys]


def _row_signal(entropy: torch.Tensor, count: torch.Tensor, row_map: RowMap) -> torch.Tensor:
    if row_map == "inverse":
        return 1 / (1 + entropy.clamp_min(0))
    return torch.where(count > 1, 1 - entropy / count.clamp_min(2).log(), torch.zeros_like(entropy))


def _attention(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any,
               scaling: float | None = None, dropout: float = 0.0, **kwargs: Any) -> tuple[torch.Tensor, None]:  # fmt: skip
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if _active and module.layer_idx in _active[-1].layers:
        if kwargs.get("s_aux") is not None:
            raise LlmselectError("attention sinks are not supported by attention statistics; use saliency: uniform")
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        visible = None if attention_mask is None else attention_mask.bool().expand(len(query), -1, -1, -1)
        _active[-1].add(module.layer_idx, query, key, visible, scale, kwargs.get("softcap"))
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)


@contextmanager
def attention_statistics(backbone: Backbone, mask: torch.Tensor, last_layers: int | None,
                         row_map: RowMap = "normalized") -> Generator[AttentionStatistics]:  # fmt: skip
    """Within the block, forwards of `backbone` on rows with this `mask` fill the yielded statistics."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(NAME, _attention)
    # Without a mask function of its own an implementation gets no mask at all and padding would be seen.
    AttentionMaskInterface.register(NAME, sdpa_mask)
    first = 0 if last_layers is None else max(0, backbone.depth - last_layers)
    statistics = AttentionStatistics(frozenset(range(first, backbone.depth)), mask, row_map)
    model = backbone.causal_lm
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    _active.append(statistics)
    try:
        yield statistics
    finally:
        _active.pop()
        model.set_attn_implementation(before)
