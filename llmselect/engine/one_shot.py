"""The loss of target rows behind an example: the example is passed once, and its keys and values serve all of them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from llmselect.engine.batch import plan
from llmselect.engine.head import CHUNK_LOGITS, check_head, logits
from llmselect.engine.memory import BackOff
from llmselect.engine.passes import default_batch_tokens
from llmselect.errors import LlmselectError

if TYPE_CHECKING:
    from llmselect.engine.backbone import Backbone
    from llmselect.engine.batch import Batch


@dataclass(frozen=True, eq=False)
class Anchors:
    """Target rows as they stand behind an example: `ids [m, A]` padded on the right, `length [m]`, `response [m, A]` the
    tokens whose loss counts, on the model's device. The first token of a row is no such token: nothing predicts it."""

    ids: torch.Tensor
    length: torch.Tensor
    response: torch.Tensor

    def __len__(self) -> int:
        return len(self.ids)


def anchors_of(backbone: Backbone, batches: Sequence[Batch], longest: int) -> tuple[Anchors, torch.Tensor]:
    """Rows (batches of one) without their BOS token, the last `longest` tokens of each; and the mean response loss `[m]` of
    the same tokens without an example, float64 in nats. Rows of which no response token is left are dropped.
    """
    check_head(backbone)
    bos, zero = backbone.tokenizer.bos_token_id, list[torch.Tensor]()
    kept = list[tuple[torch.Tensor, torch.Tensor]]()
    for batch in batches:
        ids, response = batch.ids[0][batch.mask[0]], batch.response[0][batch.mask[0]]
        first = int(ids[0] == bos)
        at = max(first, len(ids) - longest)
        # The first token that stays follows another one behind an example than alone: it counts on neither side.
        counted = torch.cat([torch.zeros_like(response[:1]), response[at + 1 :]])
        if bool(counted.any()):
            kept.append((ids[at:], counted))
            alone = _padded([(torch.cat([ids[:first], ids[at:]]), torch.cat([torch.zeros_like(response[:first]), counted]))], 0)
            zero.append(_losses(backbone, backbone.forward(alone.ids, torch.ones_like(alone.response)), alone))
    return _padded(kept, backbone.pad), torch.cat(zero) if zero else torch.zeros(0, dtype=torch.float64)


def joined(parts: Sequence[Anchors], pad: int) -> Anchors:
    """The rows of all parts, in order."""
    rows = [(ids[:n], response[:n]) for p in parts for ids, n, response in zip(p.ids, p.length, p.response, strict=True)]
    return _padded(rows, pad)


def _padded(rows: Sequence[tuple[torch.Tensor, torch.Tensor]], pad: int) -> Anchors:
    if not rows:
        return Anchors(*torch.zeros(3, 0, 0, dtype=torch.long))
    width = max(len(ids) for ids, _ in rows)

    def fill(row: torch.Tensor, value: int) -> torch.Tensor:
        return torch.nn.functional.pad(row, (0, width - len(row)), value=value)

    ids, response = (torch.stack([fill(row[i], value) for row in rows]) for i, value in enumerate((pad, False)))
    return Anchors(ids, torch.tensor([len(row) for row, _ in rows], device=ids.device), response)


def losses_after(backbone: Backbone, example: torch.Tensor, anchors: Anchors, share: bool = True) -> torch.Tensor:
    """`[m]` float64: the mean response loss of every anchor with `example [L]` in front, in nats.

    With `share` the example is passed once and its cache is copied for each batch of anchors; else example and anchor are
    passed together.
    """
    out = torch.empty(len(anchors), dtype=torch.float64, device=example.device)
    past = backbone.body(input_ids=example[None], use_cache=True).past_key_values if share else None

    def step(rows: np.ndarray) -> torch.Tensor:
        some = torch.as_tensor(rows).to(example.device)
        width = int(anchors.length[some].max())
        part = Anchors(anchors.ids[some, :width], anchors.length[some], anchors.response[some, :width])
        return _losses(backbone, _states(backbone, example, part, past), part)

    names = [f"the example before target row {i}" for i in range(len(anchors))]
    back_off = BackOff()
    for batch in plan(anchors.length.cpu().numpy() + len(example), default_batch_tokens()):
        for rows, found in back_off.run(batch, step, names):
            out[torch.as_tensor(rows).to(out.device)] = found
    return out


def _states(backbone: Backbone, example: torch.Tensor, part: Anchors, past: Any) -> torch.Tensor:
    """Final states `[B, A, d]` of the anchors behind the example.

    Padding stands at the end, where no real token sees it, so that the causal mask alone is enough.
    """
    if past is None:
        together = torch.cat([example[None].expand(len(part), -1), part.ids], 1)
        return backbone.body(input_ids=together, use_cache=False).last_hidden_state[:, len(example) :]
    own = copy.deepcopy(past)  # a pass adds to the cache that it is given
    own.batch_repeat_interleave(len(part))
    start = len(example)
    place = torch.arange(start, start + part.ids.shape[1], device=example.device)[None]
    return backbone.body(input_ids=part.ids, past_key_values=own, position_ids=place, use_cache=True).last_hidden_state


def _losses(backbone: Backbone, states: torch.Tensor, part: Anchors) -> torch.Tensor:
    """`[B]` float64 mean of -log p over each row's counted tokens, logits a chunk at a time."""
    counted = part.response[:, 1:]
    row, column = counted.nonzero(as_tuple=True)
    picked, label = states[row, column], part.ids[row, column + 1]
    size = max(1, CHUNK_LOGITS // backbone.text_config.vocab_size)
    found = [
        torch.nn.functional.cross_entropy(logits(backbone, s), y, reduction="none").double()
        for s, y in zip(torch.split(picked, size), torch.split(label, size), strict=True)
    ]
    total = torch.zeros(len(part), dtype=torch.float64, device=states.device).index_add_(0, row, torch.cat(found))
    return total / counted.sum(1)


def check_sharing(backbone: Backbone, anchors: Anchors) -> None:
    """Prove that a shared cache gives the losses of whole passes: models with other states than keys and values may differ.

    Errors: `LlmselectError` naming the setting that does without.
    """
    example = anchors.ids[0, : int(anchors.length[0])]
    try:
        shared = losses_after(backbone, example, anchors)
    except (AttributeError, NotImplementedError, TypeError) as error:
        raise LlmselectError(
            f"{backbone.path}: its cache cannot be shared by several rows ({error}); give share: false"
        ) from error
    apart = (shared - losses_after(backbone, example, anchors, share=False)).abs().max()
    tolerance = 1e-3 if backbone.dtype == torch.float32 else 5e-2
    if not apart <= tolerance * shared.abs().max():
        raise LlmselectError(f"{backbone.path}: losses from a shared cache are off by {float(apart):.3g}; give share: false")
