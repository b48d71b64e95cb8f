"""The hidden states that an SAE is trained and judged on: of prompts and responses, streamed in a seeded order."""

from __future__ import annotations

# datasets has no types.
# pyright: reportMissingTypeStubs=false, reportUnknownVariableType=false
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch
    from datasets import Dataset

    from llmselect.engine.backbone import Backbone
    from llmselect.sae.training import SaeTraining


class States:
    """Hidden states `[N, d]` of a pool's prompt and response tokens, row block by row block in a seeded order.

    A place in the stream is (epoch, row), so that a resumed training goes on where it was.
    """

    def __init__(self, pool: Dataset, backbone: Backbone, layer: int, settings: SaeTraining):
        self.pool, self.backbone, self.layer, self.settings = pool, backbone, layer, settings
        order = np.random.default_rng([settings.seed, 1]).permutation(len(pool))
        self.held_out, self.rows = order[: settings.held_out_rows], order[settings.held_out_rows :]

    def of(self, rows: np.ndarray) -> torch.Tensor:
        """The states of these rows, in fp32."""
        import torch

        from llmselect.engine.batch import collate, plan
        from llmselect.engine.passes import default_batch_tokens

        some: dict[str, list[Any]] = self.pool[rows]
        encoded = [row for row in self.backbone.encoder.encode(some["messages"]) if len(row.ids)]
        found = list[torch.Tensor]()
        with torch.inference_mode():
            for batch in plan([len(row.ids) for row in encoded], default_batch_tokens()):
                made = collate(self.backbone, [encoded[int(i)] for i in batch], (self.layer,))
                found.append(made.hidden(self.layer)[made.scope("all")].float())
        return torch.cat(found).clone()

    def buffers(self, epoch: int, row: int) -> Iterator[tuple[int, int, torch.Tensor]]:
        """(epoch, row after, shuffled states of at least `buffer_tokens`), for ever."""
        import torch

        block = 256
        while True:
            order = np.random.default_rng([self.settings.seed, 2, epoch]).permutation(self.rows)
            while row < len(order):
                first, parts, count = row, list[torch.Tensor](), 0
                while row < len(order) and count < self.settings.buffer_tokens:
                    parts.append(self.of(order[row : row + block]))
                    count, row = count + len(parts[-1]), row + block
                states = torch.cat(parts)
                mix = np.random.default_rng([self.settings.seed, 3, epoch, first]).permutation(len(states))
                yield epoch, row, states[torch.as_tensor(mix).to(states.device)]
            epoch, row = epoch + 1, 0
