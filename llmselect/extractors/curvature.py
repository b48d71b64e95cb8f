"""How sharply a row's loss bends at the model's input: low in what a model has learned well, high in noise.

Paper: the measure of Moosavi-Dezfooli et al., "Robustness via Curvature Regularization, and Vice Versa", arXiv 1811.09716
    (`direction: sign`); over random signs as an estimate of the trace of H², Garg and Roy, "Samples with Low Loss Curvature
    Improve Data Efficiency", CVPR 2023.
Objective: with x the input of the first block (embeddings), g = ∇ₓ loss, H = ∇ₓ² loss of the row's mean response loss, and z of
    unit length over all numbers of x: `value` = ‖Hz‖₂ (root mean square over draws), `along` = zᵀHz, `input_norm` = ‖g‖₂. z =
    sign(g)/‖sign(g)‖, g/‖g‖, or random signs. A score for `ccs`, or for `topk` with `order: asc` against noise.
Inputs: a causal LM; rows with response tokens. No target.
Cost: one forward and backward for g and two for each direction; 16 bytes a row.
Deviations: Hz = [g(x + hz) - g(x - hz)] / 2h, a central difference: one pass more than the papers' [g(x + hz) - g(x)] / h,
    with an error of h² instead of h; h is a share of ‖x‖. The papers are about images, where x is the input itself.
Defaults: the sign of the gradient, h = 3·10⁻⁵·‖x‖: at 10⁻³ the loss of some rows has bent otherwise, at 10⁻⁵ rounding
    shows. In bfloat16 the difference is rounding alone, so it is refused.
Use: scores for `ccs`, or the sharpest rows left out as noise; no target.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

from llmselect.engine.extractor import Arrays, Extractor, State
from llmselect.errors import UsageError
from llmselect.registry import extractors

if TYPE_CHECKING:
    import torch

    from llmselect.engine.backbone import Backbone
    from llmselect.engine.batch import Batch


@extractors.register("curvature")
@dataclass(frozen=True, kw_only=True)
class Curvature(Extractor):
    """Arrays `[n]` float32: `value`, `along`, `input_norm`, and the `loss`."""

    alone = True

    direction: Literal["sign", "gradient", "random"] = field(default="sign", metadata={"help": "what z is"})
    draws: int = field(default=4, metadata={"help": "directions of a row (random)"})
    step: float = field(default=3e-5, metadata={"help": "h as a share of ‖x‖"})
    seed: int = 0

    def __post_init__(self) -> None:
        if self.draws < 1 or self.step <= 0:
            raise UsageError(f"draws: {self.draws} must be at least 1, and step: {self.step} positive")

    def layers(self, state: State = MappingProxyType({})) -> tuple[int, ...]:
        return ()

    def arrays(self, backbone: Backbone, groups: Sequence[str]) -> Arrays:
        if str(backbone.dtype) != "torch.float32":
            raise UsageError(f"curvature: differences of gradients need float32, the model is in {backbone.dtype}; "
                             "give this feature dtype: float32")  # fmt: skip
        return dict.fromkeys(("value", "along", "input_norm", "loss"), ("float32", ()))

    def rows(self, batch: Batch, state: State) -> dict[str, torch.Tensor]:
        from llmselect.engine import curvature

        return curvature.curvature(batch.backbone, batch, self.direction, self.step, self.draws, self.seed)
