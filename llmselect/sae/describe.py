"""What a latent means: the pool rows and tokens that fire it most, so that evidence can be read by a person."""

from __future__ import annotations

# datasets has no types.
# pyright: reportMissingTypeStubs=false, reportUnknownVariableType=false
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from datasets import Dataset

    from llmselect.arrays import SparseArray
    from llmselect.engine.backbone import Backbone

CONTEXT = 8  # tokens shown on each side of the peak


def strongest_rows(x: SparseArray, latents: Sequence[int], count: int) -> dict[int, tuple[list[tuple[int, float]], int]]:
    """Per latent the `count` rows with the largest mean activation as (row, value), best first, and how many fire it.

    One pass over the sparse rows; memory O(latents · count).
    """
    held: dict[int, list[tuple[int, float]]] = {int(k): [] for k in latents}
    firing = dict.fromkeys(held, 0)
    for start, rows in x.shards():
        hits = np.flatnonzero(np.isin(rows.indices, list(held)))
        row = start + np.searchsorted(rows.indptr, hits, side="right") - 1
        for k in held:
            mine = rows.indices[hits] == k
            found = zip(row[mine].tolist(), rows.data[hits[mine]].astype(float).tolist(), strict=True)
            held[k] = sorted([*held[k], *found], key=lambda one: (-one[1], one[0]))[:count]
            firing[k] += int(mine.sum())
    return {k: (held[k], firing[k]) for k in held}


def describe(pool: Dataset, x: SparseArray, sae: Any, backbone: Backbone, layer: int, latents: Sequence[int],
             rows: int = 5) -> list[dict[str, Any]]:  # fmt: skip
    """For each latent: the share of rows that fire it, and its strongest rows with the token of the peak in context.

    Only the rows shown are passed through the model again.
    """
    import torch

    from llmselect.engine.batch import collate

    found = list[dict[str, Any]]()
    for latent, (strongest, firing) in strongest_rows(x, latents, rows).items():
        shown = list[dict[str, Any]]()
        for row, mean in strongest:
            of: dict[str, Any] = pool[row]
            (encoded,) = backbone.encoder.encode([of["messages"]])
            batch = collate(backbone, [encoded], (layer,))
            with torch.inference_mode():
                values = sae.encode(batch.hidden(layer)[0].float())[:, latent].masked_fill(~batch.scope("all")[0], 0)
            at = int(values.argmax())
            cuts = (slice(max(0, at - CONTEXT), at), slice(at, at + 1), slice(at + 1, at + 1 + CONTEXT))
            pieces = [backbone.tokenizer.decode(encoded.ids[cut]) for cut in cuts]
            shown.append({"row": row, "id": of["id"], "source": of["source"], "mean": mean,
                          "peak": float(values[at]), "before": pieces[0], "token": pieces[1], "after": pieces[2]})  # fmt: skip
        found.append({"latent": latent, "fires_in": firing / len(x), "rows": shown})
    return found


def text(found: Sequence[dict[str, Any]]) -> str:
    """The description for a person: one block per latent, the peak token in brackets."""
    lines = list[str]()
    for one in found:
        lines.append(f"latent {one['latent']}: fires in {one['fires_in']:.1%} of the rows")
        for row in one["rows"]:
            context = f"{row['before']}[{row['token']}]{row['after']}"
            lines.append(f"  {row['mean']:8.3f} mean, {row['peak']:8.3f} peak  {row['source']}: {' '.join(context.split())}")
    return "\n".join(lines)
