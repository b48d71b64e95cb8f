"""How many target rows a row helps as the one example in front of them: the golden score of NUGGETS.

Paper: Li et al., "One-Shot Learning as Instruction Data Prospector for Large Language Models", arXiv 2312.10302, section 2.
Objective: with m target rows j, NLL₀(j) the mean of -log p over the response tokens of j, NLL₁(i, j) the same with the chat of
    row i in front: `value`_i = (1/m) Σ_j 1[NLL₁(i, j) < NLL₀(j)], `gain`_i = (1/m) Σ_j [NLL₀(j) - NLL₁(i, j)] in nats; per
    target group. Take the largest (`topk`).
Inputs: a causal LM; target rows.
Cost: n·m passes: one over the row, whose keys and values all target rows share, and one over the tokens of each of the G·m
    target rows, with the LM head on their responses. Target rows are scored as pool rows are, G·m passes each.
Deviations: the paper's one set of 1,000 target rows is a draw of `anchors` per group here, keyed by their tokens; a group has
    its own score. Chats stand one behind the other as each is rendered alone, without a second BOS token. Where both do not fit
    into the model, a target row keeps the last half of the positions, a row its first token and as many of its last as fit.
    A fall of less than 10⁻⁵ of NLL₀ is rounding (an example outside a sliding window changes nothing) and does not count.
    `gain` is ours: with few anchors the golden score has many ties.
Defaults: 32 target rows per group.
Use: target examples, a small pool or a cheap model: a row costs as many passes as there are target rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING

from llmselect.engine.extractor import Arrays, Extractor, State
from llmselect.errors import LlmselectError, UsageError
from llmselect.registry import extractors

if TYPE_CHECKING:
    import torch

    from llmselect.engine.backbone import Backbone
    from llmselect.engine.batch import Batch

ROUNDING = 1e-5


@extractors.register("nuggets")
@dataclass(frozen=True, kw_only=True)
class Nuggets(Extractor):
    """Arrays `value [n, G]` and `gain [n, G]` float32, one column per target group."""

    alone = True
    fits = True
    by_group = True
    costly = True

    anchors: int | None = field(default=32, metadata={"help": "target rows of a group, drawn at random; null: all"})
    share: bool = field(default=True, metadata={"help": "pass a row once for all target rows; false: anew for each"})
    seed: int = 0

    def __post_init__(self) -> None:
        if self.anchors is not None and self.anchors < 1:
            raise UsageError(f"anchors: {self.anchors} must be at least 1")

    def layers(self, state: State = MappingProxyType({})) -> tuple[int, ...]:
        return ()

    def arrays(self, backbone: Backbone, groups: Sequence[str]) -> Arrays:
        return dict.fromkeys(("value", "gain"), ("float32", (len(groups),)))

    def fit(self, backbone: Backbone, batches: Mapping[str, list[Batch]]) -> dict[str, torch.Tensor]:
        import torch

        from llmselect.engine import one_shot

        parts, zero = list[one_shot.Anchors](), list[torch.Tensor]()
        for group, rows in batches.items():
            with torch.inference_mode():
                made, alone = one_shot.anchors_of(backbone, self._drawn(rows), positions(backbone) // 2)
            if not len(made):
                raise LlmselectError(f"target group '{group}': no row has response tokens")
            parts.append(made)
            zero.append(alone)
        every = one_shot.joined(parts, backbone.pad)
        if self.share:
            with torch.inference_mode():
                one_shot.check_sharing(backbone, every)
        sizes = torch.tensor([len(part) for part in parts])
        return {"ids": every.ids, "length": every.length, "response": every.response, "zero": torch.cat(zero), "sizes": sizes}

    def _drawn(self, rows: list[Batch]) -> list[Batch]:
        """Distinct rows in an order that their tokens and the seed decide, the first of them."""
        import numpy as np

        from llmselect.kernels.keyed import Keyed, keys_of

        known = {hashlib.sha256(row.ids.cpu().numpy().tobytes()).hexdigest(): row for row in rows}
        order = np.argsort(Keyed(self.seed, keys_of([*known], len(known))).uniform("anchors"), kind="stable")
        distinct = [*known.values()]
        return [distinct[i] for i in order[: self.anchors]]

    def rows(self, batch: Batch, state: State) -> dict[str, torch.Tensor]:
        import torch

        from llmselect.engine import one_shot

        made = one_shot.Anchors(state["ids"], state["length"], state["response"])
        room = positions(batch.backbone) - made.ids.shape[1]
        examples = [ids[mask] for ids, mask in zip(batch.ids, batch.mask, strict=True)]
        fitting = [e if len(e) <= room else torch.cat([e[:1], e[len(e) - room + 1 :]]) for e in examples]
        with torch.inference_mode():
            losses = [one_shot.losses_after(batch.backbone, one, made, self.share) for one in fitting]
        fall, sizes = state["zero"] - torch.stack(losses), [int(size) for size in state["sizes"]]
        helped = (fall > ROUNDING * state["zero"]).double()
        found = {"value": helped, "gain": fall}
        return {name: torch.stack([p.mean(1) for p in torch.split(one, sizes, 1)], 1).float() for name, one in found.items()}


def positions(backbone: Backbone) -> int:
    """Tokens that example and target row may have together: twice `max_length`, at most what the model reads."""
    limit = getattr(backbone.text_config, "max_position_embeddings", None)
    return min(2 * backbone.encoder.max_length, limit or 2 * backbone.encoder.max_length)
