"""Influence of a row on a target: the derivative of its loss along the target's inverse-Fisher-weighted gradient.

Paper: influence functions, Koh and Liang, arXiv 1703.04730; with EK-FAC, Grosse et al., arXiv 2308.03296; for selection
    Quad, arXiv 2409.16986, section 3.
Objective: per target group v = (F + λI)⁻¹ ∇L(target), F the EK-FAC Fisher of pool rows; influence of z = ⟨∇L(z), v⟩ =
    [L(z; θ + εv) - L(z; θ - εv)] / 2ε; high means that training on z lowers the target's loss.
Inputs: a causal LM; 5 to 10 target rows per group; `fisher_rows` pool rows for the Fisher.
Cost: two forward passes per group over the pool and no backward one; one forward and backward over the target, two over
    the rows of the Fisher. The directions take as much memory as the chosen layers, per group.
Deviations: a central difference in the place of a forward-mode derivative, which fused attention kernels do not have;
    v is scaled to unit length, so values are cosines times gradient norms.
Defaults: all linear layers of the blocks, damping 0.1 of the mean Λ, 256 rows for the Fisher, ε = 1e-2.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
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


@extractors.register("influence")
@dataclass(frozen=True, kw_only=True)
class Influence(Extractor):
    """Array `value [n, G]` float32, one influence per target group."""

    alone = True
    fits = True

    curvature: Literal["ekfac", "none"] = field(default="ekfac", metadata={"help": "none: the plain gradient product"})
    layers_like: str = field(default=".", metadata={"help": "regular expression on the names of linear layers"})
    last_blocks: int | None = field(default=None, metadata={"help": "only the last n decoder blocks"})
    fisher_rows: int = field(default=256, metadata={"help": "pool rows that the Fisher is estimated on"})
    damping: float = field(default=0.1, metadata={"help": "λ as a share of the mean Λ of a layer"})
    epsilon: float = field(default=1e-2, metadata={"help": "length of the step along v"})
    seed: int = 0

    def __post_init__(self) -> None:
        if self.damping <= 0 or self.epsilon <= 0 or self.fisher_rows < 1:
            raise UsageError("damping, epsilon and fisher_rows must be positive")

    @property
    def sample_rows(self) -> int:
        return self.fisher_rows if self.curvature == "ekfac" else 0

    def layers(self, state: State = MappingProxyType({})) -> tuple[int, ...]:
        return ()

    def arrays(self, backbone: Backbone, groups: Sequence[str]) -> Arrays:
        return {"value": ("float32", (len(groups),))}

    def fit(self, backbone: Backbone, batches: Mapping[str, list[Batch]],
            sample: Sequence[Batch] = ()) -> dict[str, torch.Tensor]:  # fmt: skip
        import torch

        from llmselect.engine import ekfac, gradients

        chosen = gradients.choose(backbone, self.layers_like, self.last_blocks)
        fisher = ekfac.factors(backbone, chosen, sample, self.seed) if self.curvature == "ekfac" else None
        state = {}
        for g, rows in enumerate(batches.values()):
            found = ekfac.mean_gradient(backbone, chosen, rows)
            if fisher is not None:
                found = {name: ekfac.inverse_product(fisher, name, value, self.damping) for name, value in found.items()}
            norm = torch.stack([value.norm() for value in found.values()]).norm()
            state |= {f"{g}/{name}": value / norm for name, value in found.items()}
        return state

    def rows(self, batch: Batch, state: State) -> dict[str, torch.Tensor]:
        import torch

        from llmselect.engine.head import token_stats

        backbone, found = batch.backbone, []
        for g in range(len({key.partition("/")[0] for key in state})):
            step = {key.partition("/")[2]: value for key, value in state.items() if key.startswith(f"{g}/")}
            losses = []
            for sign in (1.0, -1.0):
                with _moved(backbone, step, sign * self.epsilon):
                    stats = token_stats(backbone, backbone.forward(batch.ids, batch.mask), batch.ids, batch.response)
                losses.append(stats.mean(stats.nll.double(), len(batch.ids)).double())
            found.append((losses[0] - losses[1]) / (2 * self.epsilon))
        return {"value": torch.stack(found, 1).float()}


@contextmanager
def _moved(backbone: Backbone, step: Mapping[str, torch.Tensor], length: float) -> Iterator[None]:
    """The model at θ + length · step; afterwards its weights are the very ones they were."""
    import torch

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
