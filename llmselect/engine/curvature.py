"""How the gradient of a row's loss at the model's input turns along a direction: the curvature of the loss there."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, Literal

import torch

from llmselect.engine.gradients import backward, graph_from
from llmselect.engine.head import check_head

if TYPE_CHECKING:
    from llmselect.engine.backbone import Backbone
    from llmselect.engine.batch import Batch

Direction = Literal["sign", "gradient", "random"]


def curvature(backbone: Backbone, batch: Batch, direction: Direction, step: float, draws: int = 1,
              seed: int = 0) -> dict[str, torch.Tensor]:  # fmt: skip
    """With the input x [T, d] of the first block of a row, g = ∇ₓ loss, H = ∇ₓ² loss and directions z of unit length over all T·d
    numbers: `value` = √(mean ‖Hz‖²), `along` = mean zᵀHz, `input_norm` = ‖g‖ and `loss`, each `[B]` fp32.

    Hz = [g(x + hz) - g(x - hz)] / 2h with h = `step`·‖x‖. z is sign(g) or g itself, or `draws` random signs that depend on the
    seed and the row's tokens alone. NaN for rows without response tokens; a row without a gradient has no curvature along it: 0.
    """
    check_head(backbone)
    loss, gradient, x = _gradient(backbone, batch)
    if gradient is None:
        return dict.fromkeys(("value", "along", "input_norm", "loss"), torch.full((len(batch.ids),), float("nan")))
    real = batch.mask[..., None]
    length = step * _norm(x * real)
    square, along = torch.zeros(2, len(loss), dtype=torch.float64, device=gradient.device)
    times = draws if direction == "random" else 1
    for draw in range(times):
        z = _signs(batch, x, seed, draw) if direction == "random" else gradient.sign() if direction == "sign" else gradient
        z = z * real / _norm(z * real).clamp_min(torch.finfo(z.dtype).tiny)
        ends = [_gradient(backbone, batch, sign * length * z)[1] for sign in (1.0, -1.0)]
        assert ends[0] is not None and ends[1] is not None
        turned = (ends[0].double() - ends[1].double()) / (2 * length.double())
        square += turned.square().sum((1, 2)) / times
        along += (turned * z.double()).sum((1, 2)) / times
    found = {"value": square.sqrt(), "along": along, "input_norm": _norm(gradient)[:, 0, 0]}
    missing = loss.isnan().to(gradient.device)
    return {**{k: v.float().masked_fill(missing, float("nan")) for k, v in found.items()}, "loss": loss}


def _gradient(backbone: Backbone, batch: Batch,
              shift: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:  # fmt: skip
    """Losses, the gradient at the input of the first block moved by `shift`, and that input."""
    with torch.enable_grad(), graph_from(backbone.blocks[0], shift) as start:
        loss, gradient = backward(backbone, batch, backbone.forward(batch.ids, batch.mask), start)
    return loss, gradient, start[0].detach()


def _norm(rows: torch.Tensor) -> torch.Tensor:
    linalg: Any = torch.linalg
    return linalg.vector_norm(rows, dim=(1, 2), keepdim=True)


def _signs(batch: Batch, x: torch.Tensor, seed: int, draw: int) -> torch.Tensor:
    """Random signs for every real token of every row, whatever stands beside it in the batch."""
    out = torch.zeros_like(x)
    for i, mask in enumerate(batch.mask):
        tokens = batch.ids[i][mask].cpu().numpy().tobytes()
        key = int.from_bytes(hashlib.blake2b(f"{seed}/{draw}/".encode() + tokens, digest_size=7).digest(), "big")
        made = torch.randint(0, 2, (int(mask.sum()), x.shape[-1]), generator=torch.Generator().manual_seed(key))
        out[i, mask] = (2 * made - 1).to(x)
    return out
