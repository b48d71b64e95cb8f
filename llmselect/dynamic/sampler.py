"""A torch sampler of the epoch's rows, and what carries rows and weights through dataset and collator to the loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Sampler

from llmselect.dynamic.state import EpochState
from llmselect.errors import LlmselectError

ROW, WEIGHT = "llmselect_row", "llmselect_weight"


class EpochSampler(Sampler[Any]):
    """The rows of the state's current epoch, in the order of training.

    `set_epoch(e)` draws the rows of epoch e. Every process draws the same ones; a `DataLoader` prepared by accelerate
    gives each its own share of the batches. `sampler.state.weights` are the weights in the same order.

    Args:
        weighted: give (row, weight) pairs, which a dataset wrapped in `Weighted` understands, in place of rows.
        multiple: with `weighted`, fill up to a multiple of this many with rows of weight 0, so that several processes
            have equally many batches and no row counts twice.
    """

    def __init__(self, state: EpochState, *, weighted: bool = False, multiple: int = 1):
        self.state, self.weighted, self.multiple = state, weighted, multiple if weighted else 1

    def set_epoch(self, epoch: int) -> None:
        """Draw the rows of `epoch`, unless it is the current one."""
        self.state.begin(epoch)

    def _begun(self) -> EpochState:
        if self.state.epoch is None:
            self.state.begin(0)
        return self.state

    def __len__(self) -> int:
        return -(-len(self._begun().indices) // self.multiple) * self.multiple

    def __iter__(self) -> Iterator[Any]:
        state = self._begun()
        rows = state.indices.tolist()
        if not self.weighted:
            return iter(rows)
        short = -len(rows) % self.multiple
        filled = [(rows[i % len(rows)], 0.0) for i in range(short)]
        return iter([*zip(rows, state.weights.tolist(), strict=True), *filled])


class Weighted:
    """A map-style dataset read by (row, weight): gives (row, weight, item)."""

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, float]) -> tuple[int, float, Any]:
        return (*key, self.dataset[key[0]])

    def __getitems__(self, keys: Sequence[tuple[int, float]]) -> list[tuple[int, float, Any]]:
        read = getattr(self.dataset, "__getitems__", None)
        rows = [row for row, _ in keys]
        items = read(rows) if read else [self.dataset[row] for row in rows]
        return [(*key, item) for key, item in zip(keys, items, strict=True)]


class WeightedCollator:
    """A collator of items of `Weighted`: what `inner` makes of the items, with tensors `ROW [B]` and `WEIGHT [B]`.

    Rows of weight 0 lose their labels: neither loss nor the number of supervised tokens of the step includes them.

    Errors: `LlmselectError` when `inner` does not give one line of labels per row (packing).
    """

    def __init__(self, inner: Callable[[list[Any]], Any]):
        self.inner = inner

    def __call__(self, items: list[tuple[int, float, Any]]) -> Any:
        rows, weights, features = zip(*items, strict=True)
        batch = self.inner(list(features))
        labels = batch.get("labels")
        if labels is None or labels.ndim != 2 or len(labels) != len(items):
            found = "none" if labels is None else f"shape {tuple(labels.shape)}"
            raise LlmselectError(
                f"a schedule needs one line of labels for each of the batch's {len(items)} rows, the collator gives "
                f"{found}; use a padding collator (packing=False, padding_free=False)"
            )
        labels[torch.tensor(weights) == 0] = -100
        batch[ROW], batch[WEIGHT] = torch.tensor(rows), torch.tensor(weights, dtype=torch.float32)
        return batch
