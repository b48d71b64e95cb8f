"""Influence by a forward-mode derivative beside finite differences, sketches and explicit per-row gradients.

    python eval/performance/influence.py --model DIR --pool FILE [--rows 96] [--repeats 5] [--out FILE]

One direction (the EK-FAC inverse of a few rows' mean gradient, all linear layers of the blocks). Time per method as a ratio to a
plain forward of the model with its LM head on responses, over the same batches in the same process; agreement as the Pearson
correlation with explicit gradients, one row at a time by autograd, whose products with the direction are summed in fp64.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import llmselect as ls
from llmselect.engine import directional, ekfac, gradients
from llmselect.engine.backbone import Backbone
from llmselect.engine.batch import Batch, collate, plan
from llmselect.engine.head import token_stats
from llmselect.engine.projection import Projection

Direction = dict[str, torch.Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--pool", required=True)
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    backbone = Backbone(a.model, None, "float32", 512)
    pool = ls.load_pool(a.pool, limit=a.rows + 64)
    encoded = [row for row in backbone.encoder.encode(list(pool["messages"])) if row.response.any()]
    batches = [collate(backbone, [encoded[i] for i in rows]) for rows in plan([len(r.ids) for r in encoded[: a.rows]], 4096)]
    rest = [collate(backbone, [row]) for row in encoded[a.rows : a.rows + 32]]
    layers = gradients.choose(backbone, ".")
    fisher = ekfac.factors(backbone, layers, rest, 0)
    mean = ekfac.mean_gradient(backbone, layers, rest[:8])
    v = {name: ekfac.inverse_product(fisher, name, value, 0.1) for name, value in mean.items()}
    norm = torch.stack([value.norm() for value in v.values()]).norm()
    v = {name: value / norm for name, value in v.items()}
    print(json.dumps(found := measure(backbone, batches, layers, v, a.repeats), indent=2))
    if a.out:
        a.out.write_text(json.dumps({"rows": a.rows, "threads": torch.get_num_threads(), **found}, indent=2) + "\n")


def measure(backbone: Backbone, batches: list[Batch], layers: dict[str, torch.nn.Linear], v: Direction, repeats: int) -> dict:
    """Ratios and correlations of every method."""
    project = Projection(layers, k=64, dim=8192, seed=0, device=backbone.device)
    project.start(1)
    for name, value in v.items():
        project.matrices(name, value[None])
    theirs = project.out[0]

    def sketched(batch: Batch) -> torch.Tensor:
        project.start(len(batch.ids))
        gradients.row_gradients(backbone, batch, layers, project.reduce, project.sink)
        return project.out @ theirs

    ways: dict[str, Any] = {
        "jvp": lambda batch: directional.tangents(backbone, batch, [v])[:, 0],
        "difference": lambda batch: directional.differences(backbone, batch, [v], 1e-2)[:, 0],
        "sketch": sketched,
        "explicit gradients, one row at a time": lambda batch: explicit(backbone, batch, layers, v),
    }
    plain = lambda batch: token_stats(backbone, forward(backbone, batch), batch.ids, batch.response)  # noqa: E731
    values, ratios = {}, {name: [] for name in ways}
    for _ in range(repeats):
        floor = timed(lambda: [plain(batch) for batch in batches])
        for name, way in ways.items():
            seconds = timed(lambda name=name, way=way: values.update({name: torch.cat([way(batch) for batch in batches])}))
            ratios[name].append(seconds / floor)
    truth = values["explicit gradients, one row at a time"].double().numpy()
    return {name: {"forwards": {"median": round(statistics.median(r), 2), "min": round(min(r), 2), "max": round(max(r), 2)},
                   "pearson": round(float(np.corrcoef(values[name].double().numpy(), truth)[0, 1]), 6)}
            for name, r in ratios.items()}  # fmt: skip


@torch.no_grad()
def forward(backbone: Backbone, batch: Batch) -> torch.Tensor:
    return backbone.forward(batch.ids, batch.mask)


def explicit(backbone: Backbone, batch: Batch, layers: dict[str, torch.nn.Linear], v: Direction) -> torch.Tensor:
    """⟨∇L(z), v⟩ by autograd on the weights themselves."""
    weights = {name: layer.weight for name, layer in layers.items()}
    found = []
    for ids, mask, response in zip(batch.ids, batch.mask, batch.response, strict=True):
        for weight in weights.values():
            weight.requires_grad_(True)
        logits = backbone.causal_lm(ids[mask][None]).logits[0, :-1].float()
        told = response[mask][1:]
        loss = torch.nn.functional.cross_entropy(logits[told], ids[mask][1:][told])
        made = torch.autograd.grad(loss, list(weights.values()))
        found.append(sum((g.double() * v[name]).sum() for name, g in zip(weights, made, strict=True)))
        for weight in weights.values():
            weight.requires_grad_(False)
    return torch.stack(found).float()


def timed(work: Any) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
