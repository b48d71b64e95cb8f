"""Token by token choices during generation: greedy or drawn per row, and where a row ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from llmselect.errors import LlmselectError
from llmselect.kernels.keyed import Keyed


class Choose:
    """A logits processor that leaves each row the one token it takes, so that an argmax after it picks that token.

    Args:
        keyed: one key a row; the draw of a row's n-th token depends on the seed, its key and n alone, never on the
            rows it shares a batch with.
        start: tokens of the padded prompts.
        names: how an error calls each row.

    At temperature 0 the largest logit stays; else the draw is by inverse CDF over the smallest set of most probable
    tokens whose mass reaches `top_p`.
    """

    def __init__(self, keyed: Keyed, temperature: float, top_p: float, start: int, names: Sequence[str]):
        self.keyed, self.temperature, self.top_p, self.start, self.names = keyed, temperature, top_p, start, names

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if bool((bad := scores.isnan().any(-1)).any()):
            row = self.names[int(bad.nonzero()[0])]
            raise LlmselectError(f"{row}: the model gives NaN; try dtype float32, or check the weights and the adapter")
        if not self.temperature:
            return scores
        # The largest logit is taken off first: a tiny temperature must not overflow.
        scaled = (scores.float() - scores.float().amax(-1, keepdim=True)) / self.temperature
        mass, order = scaled.softmax(-1).sort(dim=-1, descending=True, stable=True)
        below = mass.cumsum(-1) - mass
        kept = mass * (below < self.top_p)
        drawn = self.keyed.uniform(f"token {ids.shape[1] - self.start}").astype(np.float32)
        limit = torch.as_tensor(drawn).to(scores.device)[:, None] * kept.sum(-1, keepdim=True)
        place = (kept.cumsum(-1) <= limit).sum(-1, keepdim=True)
        last = (kept > 0).sum(-1, keepdim=True) - 1  # rounding may leave the sum a hair below the draw
        token = order.gather(-1, torch.minimum(place, last))
        return torch.full_like(scores, -torch.inf).scatter_(-1, token, 0.0)


class StopStrings:
    """A stopping criterion that ends a row when its own new text contains one of some strings.

    `ended [B]`: the number of new tokens at which each row met one, 0 while it has not.
    """

    def __init__(self, stop: Sequence[str], decode: Callable[[list[int]], str], start: int, rows: int):
        self.stop, self.decode, self.start = stop, decode, start
        # A character takes at most four byte-level tokens, so this many recent tokens hold any string that just ended.
        self.window = 4 * max(map(len, stop)) + 4
        self.ended = np.zeros(rows, np.int64)

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
        new = ids[:, self.start :]
        recent = new[:, -self.window :].cpu().numpy()
        for row in np.flatnonzero(self.ended == 0):
            text = self.decode(recent[row].tolist())
            if any(one in text for one in self.stop):
                self.ended[row] = new.shape[1]
        return torch.as_tensor(self.ended > 0).to(ids.device)
