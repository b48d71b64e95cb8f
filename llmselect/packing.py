"""Collators: rows side by side in one sequence (packed), or one row a line (padded)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llmselect.errors import LlmselectError

Item = dict[str, list[int]]  # input_ids, labels
Collator = Callable[[list[Item]], dict[str, Any]]


def bins(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """First-fit decreasing: item numbers in bins of at most `capacity` tokens (a longer item has its own)."""
    out: list[list[int]] = []
    room: list[int] = []
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = next((b for b, free in enumerate(room) if free >= lengths[item]), None)
        if at is None:
            out.append([item])
            room.append(capacity - lengths[item])
        else:
            out[at].append(item)
            room[at] -= lengths[item]
    return out


def packed(pad: int, capacity: int) -> Collator:
    """Rows in as few sequences of `capacity` tokens as first-fit finds, told apart by positions that start again at 0.

    There is no attention mask: with one, transformers would not look at the positions and rows would see each other.
    The first token of a row has no label, or the row before would be trained to predict it.
    """

    def collate(items: list[Item]) -> dict[str, Any]:
        import torch

        groups = bins([len(item["input_ids"]) for item in items], capacity)
        width = max(sum(len(items[i]["input_ids"]) for i in group) for group in groups)
        ids = torch.full((len(groups), width), pad)
        told = torch.full((len(groups), width), -100)
        position = torch.zeros((len(groups), width), dtype=torch.long)  # padding: rows of one token
        for line, group in enumerate(groups):
            at = 0
            for i in group:
                size = len(items[i]["input_ids"])
                ids[line, at : at + size] = torch.tensor(items[i]["input_ids"])
                told[line, at + 1 : at + size] = torch.tensor(items[i]["labels"][1:])
                position[line, at : at + size] = torch.arange(size)
                at += size
        return {"input_ids": ids, "labels": told, "position_ids": position}

    return collate


def padded(pad: int) -> Collator:
    """One row a line, padded on the right, with an attention mask."""

    def collate(items: list[Item]) -> dict[str, Any]:
        import torch
        from torch.nn.utils.rnn import pad_sequence

        ids = [torch.tensor(item["input_ids"]) for item in items]
        told = [torch.tensor(item["labels"]) for item in items]
        return {"input_ids": pad_sequence(ids, batch_first=True, padding_value=pad),
                "attention_mask": pad_sequence([torch.ones_like(i) for i in ids], batch_first=True),
                "labels": pad_sequence(told, batch_first=True, padding_value=-100)}  # fmt: skip

    return collate


def check_packing(model: Any, pad: int) -> None:
    """Prove once that two packed rows do not see each other: recurrent and some custom models ignore positions.

    Errors: `LlmselectError` saying how to train without packing.
    """
    import torch

    rows = [[pad, 5, 6, 7, 8, 9], [pad, 6, 5, 4, 3]]
    items = [{"input_ids": ids, "labels": ids} for ids in rows]
    batch = {k: v.to(model.device) for k, v in packed(pad, 16)(items).items() if k != "labels"}
    with torch.inference_mode():
        together = model(**batch, use_cache=False).logits[0, len(rows[0]) : len(rows[0]) + len(rows[1])]
        alone = model(input_ids=torch.tensor([rows[1]], device=model.device), use_cache=False).logits[0]
    scale = float(alone.abs().max()) or 1.0
    if not torch.allclose(together, alone, atol=(1e-3 if alone.dtype == torch.float32 else 5e-2) * scale, rtol=0):
        raise LlmselectError("this model lets packed rows see each other; type train.packing=false")
