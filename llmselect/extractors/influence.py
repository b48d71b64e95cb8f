"""Influence of a row on a target: the derivative of its loss along the target's inverse-Fisher-weighted gradient.

Paper: influence functions, Koh and Liang, arXiv 1703.04730; with EK-FAC, Grosse et al., arXiv 2308.03296; for selection
    Quad, arXiv 2409.16986, section 3.
Objective: per target group v = (F + λI)⁻¹ ∇L(target), F the EK-FAC Fisher of pool rows; influence of z = ⟨∇L(z), v⟩; high
    means that training on z lowers the target's loss. `method`: `jvp`, a forward-mode derivative, exact; `difference`,
    [L(z; θ + εv) - L(z; θ - εv)] / 2ε; `sketch`, the product of sketched gradients, one backward for any number of groups.
Inputs: a causal LM; 5 to 10 target rows per group; `fisher_rows` pool rows for the Fisher.
Cost: `jvp` one forward pass with tangents per group over the pool, `difference` two plain ones, `sketch` one forward and one
    backward in all; one forward and backward over the target, two over
    the rows of the Fisher. The directions take as much memory as the chosen layers, per group.
Deviations: v is scaled to unit length, so values are cosines times gradient norms.
Defaults: `jvp`, all linear layers of the blocks, damping 0.1 of the mean Λ, 256 rows for the Fisher, ε = 1e-2.
Use: a derivative along the target rather than a likeness; `lazy: true` under `quad`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary

from llmselect.engine.extractor import Arrays, Extractor, State
from llmselect.errors import UsageError
from llmselect.registry import extractors

if TYPE_CHECKING:
    import torch

    from llmselect.engine.backbone import Backbone
    from llmselect.engine.batch import Batch


_READY: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()


@extractors.register("influence")
@dataclass(frozen=True, kw_only=True)
class Influence(Extractor):
    """Array `value [n, G]` float32, one influence per target group."""

    alone = True
    fits = True
    by_group = True
    version = 2

    method: Literal["jvp", "difference", "sketch"] = field(default="jvp", metadata={"help": "how ⟨∇L(z), v⟩ is computed"})
    curvature: Literal["ekfac", "none"] = field(default="ekfac", metadata={"help": "none: the plain gradient product"})
    layers_like: str = field(default=".", metadata={"help": "regular expression on the names of linear layers"})
    last_blocks: int | None = field(default=None, metadata={"help": "only the last n decoder blocks"})
    fisher_rows: int = field(default=256, metadata={"help": "pool rows that the Fisher is estimated on"})
    damping: float = field(default=0.1, metadata={"help": "λ as a share of the mean Λ of a layer"})
    epsilon: float = field(default=1e-2, metadata={"help": "length of the step along v (difference)"})
    dim: int = field(default=8192, metadata={"help": "numbers per gradient (sketch)"})
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
        from llmselect.engine import ekfac, gradients

        chosen = gradients.choose(backbone, self.layers_like, self.last_blocks)
        fisher = ekfac.factors(backbone, chosen, sample, self.seed) if self.curvature == "ekfac" else None
        state: dict[str, torch.Tensor] = {}
        for g, rows in enumerate(batches.values()):
            found = ekfac.mean_gradient(backbone, chosen, rows)
            if fisher is not None:
                found = {name: ekfac.inverse_product(fisher, name, value, self.damping) for name, value in found.items()}
            length = _norm(list(found.values()))
            state |= {f"{g}/{name}": value / length for name, value in found.items()}
        return state

    def rows(self, batch: Batch, state: State) -> dict[str, torch.Tensor]:
        from llmselect.engine import directional

        groups = range(len({key.partition("/")[0] for key in state}))
        directions = [{k.partition("/")[2]: v for k, v in state.items() if k.startswith(f"{g}/")} for g in groups]
        if self.method == "jvp":
            return {"value": directional.tangents(batch.backbone, batch, directions)}
        if self.method == "difference":
            return {"value": directional.differences(batch.backbone, batch, directions, self.epsilon)}
        return {"value": self._sketched(batch, directions)}

    def _sketched(self, batch: Batch, directions: list[dict[str, torch.Tensor]]) -> torch.Tensor:
        import torch

        from llmselect.engine import gradients
        from llmselect.engine.projection import Projection

        if batch.backbone not in _READY:
            layers = gradients.choose(batch.backbone, self.layers_like, self.last_blocks)
            made = Projection(layers, k=64, dim=self.dim, seed=self.seed, device=batch.backbone.device)
            made.start(len(directions))
            for name in layers:  # the directions go through the very projection of the rows
                made.matrices(name, torch.stack([direction[name].float() for direction in directions]))
            _READY[batch.backbone] = made, made.out
        made, theirs = _READY[batch.backbone]
        made.start(len(batch.ids))
        loss = gradients.row_gradients(batch.backbone, batch, made.layers, made.reduce, made.sink)
        return (made.out @ theirs.T).masked_fill(loss.isnan()[:, None], float("nan"))


def _norm(parts: list[Any]) -> torch.Tensor:
    """The norm of several arrays taken together."""
    import torch

    norms: Any = torch.stack([part.norm() for part in parts])
    return norms.norm()
