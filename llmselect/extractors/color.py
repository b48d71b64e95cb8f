"""How much more the target's model likes a row than a model of the pool does: CoLoR-Filter.

Paper: CoLoR-Filter of Brandfonbrener et al., "Conditional Loss Reduction Filtering for Targeted Language Model Pre-training",
    arXiv 2406.10670, section 3.
Objective: `value` = NLL(row | prior) - NLL(row | conditional), each the mean over supervised tokens in nats; take the largest
    (`topk`). The conditional model has seen the target, the prior a random part of the pool.
Inputs: a causal LM and two LoRA adapters on it: folders, or `trained`, those of a recipe's `color:` section. No target at
    extraction.
Cost: two forwards over the same encoded batches, with the LM head on supervised tokens; 12 bytes a row. `color:` trains twice
    on as many tokens as the target has.
Deviations: two adapters on one base, trained on equal numbers of supervised tokens; in the paper the conditional model goes on
    from the prior. Rows that are in the target too would score too high: a recipe drops them (`pool.decontaminate`), there is
    no cross-fitting.
Defaults: both `trained`.
Use: a target with rows enough to fine-tune on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from llmselect.engine.extractor import Arrays, Extractor, State
from llmselect.errors import UsageError
from llmselect.registry import extractors

if TYPE_CHECKING:
    import torch

    from llmselect.engine.backbone import Backbone
    from llmselect.engine.batch import Batch
    from llmselect.engine.moments import Checkpoint

_READY: WeakKeyDictionary[Any, list[Checkpoint]] = WeakKeyDictionary()


@extractors.register("color")
@dataclass(frozen=True, kw_only=True)
class Color(Extractor):
    """Arrays `[n]` float32: `value`, and the losses `prior` and `conditional`."""

    alone = True

    prior: str | None = field(default="trained", metadata={"help": "adapter folder, or `trained`; null: the base model"})
    conditional: str = field(default="trained", metadata={"help": "adapter folder, or `trained`: the recipe's"})

    def layers(self, state: State = MappingProxyType({})) -> tuple[int, ...]:
        return ()

    def _places(self) -> list[Path]:
        given = [one for one in (self.prior, self.conditional) if one is not None]
        if "trained" in given:
            raise UsageError("prior, conditional: give adapter folders; `trained` needs a recipe with a color: section")
        return [Path(one) for one in given]

    def settings(self) -> dict[str, Any]:
        from llmselect.engine.backbone import weights_digest

        found = [weights_digest(str(place)) for place in self._places()]
        return {"prior": None if self.prior is None else found[0], "conditional": found[-1]}

    def arrays(self, backbone: Backbone, groups: Sequence[str]) -> Arrays:
        return {name: ("float32", ()) for name in ("value", "prior", "conditional")}

    def rows(self, batch: Batch, state: State) -> dict[str, torch.Tensor]:
        from llmselect.engine import moments

        if batch.backbone not in _READY:
            _READY[batch.backbone] = moments.load(batch.backbone, self._places(), adam=False, reference=False)
        found = []
        for one in [*([None] if self.prior is None else []), *_READY[batch.backbone]]:
            with moments.at(batch.backbone, one):
                stats = batch.measured()
            found.append(stats.mean(stats.nll, len(batch.ids)))
        return {"value": found[0] - found[1], "prior": found[0], "conditional": found[1]}
