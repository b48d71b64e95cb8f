"""The derivative of every row's loss along one direction of the weights: no per-row gradient, no sketch.

⟨∇L(z), v⟩ = d/dε L(z; θ + εv) at 0, for all rows z of a batch at once: exactly by a forward-mode derivative, or by the
difference of two forward passes.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from llmselect.engine.gradients import head_gradients
from llmselect.engine.head import check_head, token_stats

if TYPE_CHECKING:
    from llmselect.engine.backbone import Backbone
    from llmselect.engine.batch import Batch

Direction = Mapping[str, torch.Tensor]  # linear layer → a matrix shaped like its weight


def tangents(backbone: Backbone, batch: Batch, directions: Sequence[Direction]) -> torch.Tensor:
    """`[B, G]` fp32, the derivative of each row's mean response loss along each direction, by forward-mode differentiation.

    One forward pass with tangents per direction, about twice a plain one; the LM head is passed once, on response positions,
    since d nll = ⟨∂nll/∂h, dh⟩. NaN for rows without response tokens. Attention runs as plain products: the fused kernels have
    no forward derivative.
    """
    import torch.autograd.forward_ad
    from torch.nn.attention import SDPBackend, sdpa_kernel

    forward: Any = torch.autograd.forward_ad
    check_head(backbone)
    supervised = batch.response[:, 1:]
    row, column = supervised.nonzero(as_tuple=True)
    count = supervised.sum(1)
    out = torch.full((len(count), len(directions)), float("nan"), dtype=torch.float64, device=batch.ids.device)
    gradient: torch.Tensor | None = None
    for g, direction in enumerate(directions if len(row) else []):
        with torch.no_grad(), forward.dual_level(), sdpa_kernel(SDPBackend.MATH), _dual(backbone, direction):
            both = forward.unpack_dual(backbone.forward(batch.ids, batch.mask))
            assert both.tangent is not None
            picked, moved = both.primal[row, column].detach(), both.tangent[row, column]
        if gradient is None:
            with torch.enable_grad():
                gradient = head_gradients(backbone, picked, batch.ids[row, column + 1], 1.0 / count[row])[1]
        terms = (gradient.double() * moved.double()).sum(1)
        out[:, g] = torch.zeros(len(count), dtype=torch.float64, device=out.device).index_add_(0, row, terms)
    out[count == 0] = float("nan")
    return out.float()


def differences(backbone: Backbone, batch: Batch, directions: Sequence[Direction], epsilon: float) -> torch.Tensor:
    """`[B, G]` fp32: [L(z; θ + εv) - L(z; θ - εv)] / 2ε, two forward passes per direction."""
    found = list[torch.Tensor]()
    for direction in directions:
        losses = list[torch.Tensor]()
        for sign in (1.0, -1.0):
            with _moved(backbone, direction, sign * epsilon):
                stats = token_stats(backbone, backbone.forward(batch.ids, batch.mask), batch.ids, batch.response)
            losses.append(stats.mean(stats.nll.double(), len(batch.ids)).double())
        found.append((losses[0] - losses[1]) / (2 * epsilon))
    return torch.stack(found, 1).float()


@contextmanager
def _dual(backbone: Backbone, direction: Direction) -> Generator[None]:
    """The model with weights that carry `direction` as their tangent."""
    import torch.autograd.forward_ad

    forward: Any = torch.autograd.forward_ad
    modules = dict(backbone.causal_lm.named_modules())
    kept = {name: modules[name]._parameters.pop("weight") for name in direction}
    try:
        for name, weight in kept.items():
            assert weight is not None
            modules[name].weight = forward.make_dual(weight.detach(), direction[name].to(weight.dtype))
        yield
    finally:
        for name, weight in kept.items():
            del modules[name].weight
            modules[name]._parameters["weight"] = weight


@contextmanager
def _moved(backbone: Backbone, step: Direction, length: float) -> Generator[None]:
    """The model at θ + length · step; afterwards its weights are the very ones they were."""
    modules = dict(backbone.causal_lm.named_modules())
    kept = {name: modules[name].weight.data for name in step}
    try:
        with torch.no_grad():
            for name, direction in step.items():
                modules[name].weight.data = kept[name] + length * direction.to(kept[name].dtype)
        yield
    finally:
        for name, weight in kept.items():
            modules[name].weight.data = weight
