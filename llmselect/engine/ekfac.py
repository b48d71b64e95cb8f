"""EK-FAC: the Fisher matrix of chosen linear layers in its Kronecker eigenbasis, and inverse-Fisher-vector products.

Papers: K-FAC, Martens and Grosse, arXiv 1503.05671; EK-FAC, George et al., arXiv 1806.03884; for language models Grosse
    et al., arXiv 2308.03296, section 2.4.

Per layer, with the input a_t and the output gradient g_t of a token: A = E[aaᵀ], S = E[ggᵀ] with eigenvectors U_A, U_S;
with a row's gradient G, Λ_ij = E[(U_SᵀGU_A)²_ij]; then F ≈ (U_S⊗U_A) diag(Λ) (U_S⊗U_A)ᵀ.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from llmselect.engine.gradients import outer, row_gradients
from llmselect.errors import LlmselectError

if TYPE_CHECKING:
    from llmselect.engine.backbone import Backbone
    from llmselect.engine.batch import Batch

Layers = dict[str, torch.nn.Linear]


def factors(backbone: Backbone, layers: Layers, batches: Iterable[Batch], seed: int | None = 0) -> dict[str, torch.Tensor]:
    """The Fisher of the mean response loss over rows: `<layer>.input [d_in, d_in]`, `<layer>.output [d_out, d_out]`
    (eigenvectors in columns), `<layer>.scale [d_out, d_in]` (Λ), in fp32.

    Args:
        batches: rows; gone through twice, so a list.
        seed: labels are drawn from the model's own predictions (the true Fisher); None takes the given ones (empirical).

    Errors: `LlmselectError` when no row has a response token.
    """
    batches = list(batches)
    found = _eigenvectors(backbone, layers, batches, seed)
    total = {name: torch.zeros(layer.weight.shape, dtype=torch.float64, device=backbone.device) for name, layer in layers.items()}
    rows = 0

    def rotated(name: str, activation: torch.Tensor, gradient: torch.Tensor) -> None:
        turned = outer(gradient.float() @ found[f"{name}.output"], activation.float() @ found[f"{name}.input"])
        total[name] += turned.square().sum(0)

    for batch, generator in _draws(batches, seed, backbone.device):
        loss = row_gradients(backbone, batch, layers, lambda name, a: a, rotated, sample=generator)
        rows += int(loss.isfinite().sum())
    if not rows:
        raise LlmselectError("EK-FAC: none of the rows has a response token")
    return found | {f"{name}.scale": (value / rows).float() for name, value in total.items()}


def _draws(batches: list[Batch], seed: int | None, device: torch.device) -> Iterable[tuple[Batch, torch.Generator | None]]:
    """Each batch with a source of labels, the same in both passes."""
    for i, batch in enumerate(batches):
        yield batch, None if seed is None else torch.Generator(device).manual_seed(seed * 1_000_003 + i)


def _eigenvectors(backbone: Backbone, layers: Layers, batches: list[Batch], seed: int | None) -> dict[str, torch.Tensor]:
    def zero(size: int) -> torch.Tensor:
        return torch.zeros(size, size, dtype=torch.float64, device=backbone.device)

    linalg: Any = torch.linalg
    inputs = {name: zero(layer.in_features) for name, layer in layers.items()}
    outputs = {name: zero(layer.out_features) for name, layer in layers.items()}

    def gather(name: str, activation: torch.Tensor, gradient: torch.Tensor) -> None:
        # Padding has no gradient, but it has an input: only tokens that a loss reaches count.
        reached = gradient.abs().amax(-1) > 0
        a, g = activation[reached].double(), gradient[reached].double()
        inputs[name] += a.T @ a
        outputs[name] += g.T @ g

    for batch, generator in _draws(batches, seed, backbone.device):
        row_gradients(backbone, batch, layers, lambda name, a: a, gather, sample=generator)
    found = {f"{name}.input": linalg.eigh(matrix).eigenvectors.float() for name, matrix in inputs.items()}
    return found | {f"{name}.output": linalg.eigh(matrix).eigenvectors.float() for name, matrix in outputs.items()}


def inverse_product(state: Mapping[str, torch.Tensor], layer: str, gradient: torch.Tensor, damping: float) -> torch.Tensor:
    """(F + λI)⁻¹ vec(V) for `gradient [..., d_out, d_in]`: U_S[(U_SᵀVU_A) / (Λ + λ)]U_Aᵀ, λ = damping · mean Λ."""
    left, right, scale = (state[f"{layer}.{part}"] for part in ("output", "input", "scale"))
    turned = left.T @ gradient.float() @ right
    return left @ (turned / (scale + damping * scale.mean().clamp_min(1e-30))) @ right.T


def mean_gradient(backbone: Backbone, layers: Layers, batches: Iterable[Batch]) -> dict[str, torch.Tensor]:
    """Per layer the mean over rows of the gradient of the row's mean response loss, `[d_out, d_in]` fp32."""
    total = {name: torch.zeros(layer.weight.shape, dtype=torch.float64, device=backbone.device) for name, layer in layers.items()}
    rows = 0

    def add(name: str, activation: torch.Tensor, gradient: torch.Tensor) -> None:
        total[name] += torch.einsum("bto,bti->oi", gradient.double(), activation.double())

    for batch in batches:
        rows += int(row_gradients(backbone, batch, layers, lambda name, a: a, add).isfinite().sum())
    if not rows:
        raise LlmselectError("none of the target rows has a response token")
    return {name: (value / rows).float() for name, value in total.items()}
