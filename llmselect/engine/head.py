"""The LM head over supervised positions only, in chunks: `[B, T, V]` logits are never built."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from llmselect.errors import LlmselectError

if TYPE_CHECKING:
    from llmselect.engine.backbone import Backbone

CHUNK_LOGITS = 1 << 24  # 64 MiB of fp32 logits at a time


@dataclass(frozen=True)
class TokenStats:
    """Per supervised token, flat: `row [N]` (its row in the batch), `nll`, `entropy`, `margin`, `el2n` `[N]` in nats /
    probability."""

    row: torch.Tensor
    nll: torch.Tensor
    entropy: torch.Tensor
    margin: torch.Tensor
    el2n: torch.Tensor

    def mean(self, values: torch.Tensor, rows: int) -> torch.Tensor:
        """Mean of `values [N]` over each row's tokens, `[rows]`; NaN for a row that has none."""
        total = torch.zeros(rows, dtype=torch.float64, device=values.device)
        count = torch.zeros_like(total)
        total.index_add_(0, self.row, values.double())
        count.index_add_(0, self.row, torch.ones_like(values, dtype=torch.float64))
        return (total / count).float()


@torch.inference_mode()
def token_stats(backbone: Backbone, hidden: torch.Tensor, ids: torch.Tensor, supervised: torch.Tensor) -> TokenStats:
    """Statistics of p(· | tokens before t) at every supervised t ≥ 1.

    nll = -log p(x_t); entropy = -Σ_v p log p; margin = difference of the two largest probabilities; el2n = ‖p - 1_{x_t}‖₂.
    """
    check_head(backbone)
    row, column = supervised[:, 1:].nonzero(as_tuple=True)
    states, labels = hidden[row, column], ids[row, column + 1]
    size = max(1, CHUNK_LOGITS // backbone.text_config.vocab_size)
    out = [_statistics(logits(backbone, s), y) for s, y in zip(torch.split(states, size), torch.split(labels, size), strict=True)]
    if not out:
        empty = torch.zeros(0, device=ids.device)
        return TokenStats(row, empty, empty, empty, empty)
    return TokenStats(row, *(torch.cat(parts) for parts in zip(*out, strict=True)))


def logits(backbone: Backbone, states: torch.Tensor) -> torch.Tensor:
    """fp32 logits of final hidden states `[N, d]`, with the soft cap of the models that have one."""
    out = backbone.causal_lm.get_output_embeddings()(states).float()
    cap = getattr(backbone.text_config, "final_logit_softcapping", None)
    return torch.tanh(out / cap) * cap if cap else out


def _statistics(logit: torch.Tensor, label: torch.Tensor) -> tuple[torch.Tensor, ...]:
    lse = logit.logsumexp(-1)
    nll = lse - logit.gather(-1, label[:, None])[:, 0]
    top = logit.topk(2, dim=-1).values
    margin = (top[:, 0] - lse).exp() - (top[:, 1] - lse).exp()
    # The expectation is taken in place: a second [N, V] matrix would double the memory of the chunk.
    probability = (logit - lse[:, None]).exp_()
    own = probability.gather(-1, label[:, None])
    linalg: Any = torch.linalg
    el2n = linalg.vector_norm(probability.scatter_(-1, label[:, None], own - 1), dim=-1)
    probability.scatter_(-1, label[:, None], own)
    return nll, lse - probability.mul_(logit).sum(-1), margin, el2n


def check_head(backbone: Backbone) -> None:
    """Prove once per model that head(final state) is the model's logits: some families scale or cap them elsewhere."""
    if backbone.head_checked:
        return
    ids = torch.arange(8, device=backbone.device)[None] % backbone.text_config.vocab_size
    mask = torch.ones_like(ids, dtype=torch.bool)
    with torch.inference_mode():
        own = logits(backbone, backbone.states(ids, mask, (-1,))[backbone.depth][0])
        theirs = backbone.causal_lm(input_ids=ids, use_cache=False).logits[0].float()
    tolerance = 1e-3 if backbone.dtype == torch.float32 else 5e-2
    if not torch.allclose(own, theirs, atol=tolerance * float(theirs.abs().max()), rtol=0):
        raise LlmselectError(
            f"{backbone.path}: its logits are not head(last hidden state) (off by {(own - theirs).abs().max():.3g}); "
            "losses of this architecture are not supported"
        )
    backbone.head_checked = True
