"""The loss of a batch whose rows have weights, and the loss of each row from the same forward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def row_sums(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Per row the sum of −log p over its supervised tokens `[B]` float32, and their number `[B]`.

    Args:
        logits: `[B, T, V]`; position t predicts token t + 1.
        labels: `[B, T]`, −100 where nothing is learned.
    """
    from torch.nn.functional import cross_entropy

    told = labels[:, 1:]
    keep = told != -100
    # Only supervised positions are widened to float32, the largest array of a step.
    nll = cross_entropy(logits[:, :-1][keep].float(), told[keep], reduction="none")
    row = keep.nonzero()[:, 0]
    return nll.new_zeros(len(labels)).index_add(0, row, nll), keep.sum(1)


def weighted_loss(sums: Tensor, weights: Tensor, tokens: Tensor) -> Tensor:
    """Σᵢ wᵢ Σₜ −log p(yᵢₜ) / N over the rows of a batch, N = `tokens`: the supervised tokens of the whole step, so that
    weights of 1 give the mean that Trainer takes."""
    return (weights * sums).sum() / tokens.clamp(min=1)
