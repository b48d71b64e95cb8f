"""How the loss of every row moves while a model trains: its mean response loss at each checkpoint of a warm-up.

Paper: the input of CLD, arXiv 2508.20230, LTC, arXiv 2503.09721, and S2L, Yang et al., arXiv 2403.07384; EL2N of Paul et al.,
    arXiv 2107.07075.
Objective: `value`_it = mean over the supervised tokens y of row i of -log p_t(y | everything before), in nats, p_t the model
    at checkpoint t in the order of training, the base model first; `entropy` = mean H(p_t), `el2n` = mean ‖p_t - 1_y‖₂.
Inputs: a causal LM and LoRA checkpoints on it (`checkpoints: warmup` with `warmup.train.checkpoints: 16` or more).
Cost: one forward per checkpoint over the same encoded batches, with the LM head on supervised tokens; 12 bytes a row and
    checkpoint.
Deviations: checkpoints of LoRA, where the papers fine-tune all weights of a small proxy; any model that fits is one.
Defaults: with the base model.
Use: `cld`, LTC and S2L.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
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
    from llmselect.engine.head import TokenStats
    from llmselect.engine.moments import Checkpoint

_READY: WeakKeyDictionary[Any, list[Checkpoint]] = WeakKeyDictionary()


@extractors.register("trajectory")
@dataclass(frozen=True, kw_only=True)
class Trajectory(Extractor):
    """Arrays `value`, `entropy`, `el2n`, each `[n, T]` float32."""

    alone = True

    checkpoints: str = field(default="warmup", metadata={"help": "folder of LoRA checkpoints; `warmup`: the recipe's"})
    base: bool = field(default=True, metadata={"help": "also the model before training, as the first column"})

    def layers(self, state: State = MappingProxyType({})) -> tuple[int, ...]:
        return ()

    def settings(self) -> dict[str, Any]:
        from llmselect.engine.backbone import weights_digest

        return {**super().settings(), "checkpoints": [weights_digest(str(folder)) for folder in self._places()]}

    def _places(self) -> list[Any]:
        from llmselect.engine.moments import folders

        if self.checkpoints == "warmup":
            raise UsageError("checkpoints: give a folder; `warmup` needs a recipe with a warmup: section")
        return folders(self.checkpoints)

    def arrays(self, backbone: Backbone, groups: Sequence[str]) -> Arrays:
        width = len(self._places()) + self.base
        return {name: ("float32", (width,)) for name in ("value", "entropy", "el2n")}

    def rows(self, batch: Batch, state: State) -> dict[str, torch.Tensor]:
        import torch

        from llmselect.engine import moments

        if batch.backbone not in _READY:
            _READY[batch.backbone] = moments.load(batch.backbone, self._places(), adam=False, reference=False)
        found: list[TokenStats] = []
        for one in [*([None] if self.base else []), *_READY[batch.backbone]]:
            with moments.at(batch.backbone, one):
                found.append(batch.measured())
        named = (("value", "nll"), ("entropy", "entropy"), ("el2n", "el2n"))
        return {key: torch.stack([s.mean(getattr(s, name), len(batch.ids)) for s in found], 1) for key, name in named}
