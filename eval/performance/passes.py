"""How much the feature passes cost beyond a plain forward of the model body over the same batches.

    python eval/performance/passes.py --model DIR --pool FILE [--rows 512] [--repeats 7]

Paired in one process, interleaved; the figure is the median of the ratios with its range. Also peak memory of the
process per feature: the growth of resident memory while passes run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from llmselect.engine.backbone import Backbone
from llmselect.engine.batch import collate, plan
from llmselect.engine.passes import Pass, fit
from llmselect.extractors import Embedding, Loss, Trim
from llmselect.pool import load_pool


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--pool", required=True)
    parser.add_argument("--target", required=True)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def main() -> None:
    a = arguments()
    pool = load_pool(a.pool, limit=a.rows)
    target = load_pool(a.target, group="target", limit=10)
    backbone = Backbone(a.model, max_length=512)
    features = {"trim": Trim(model=a.model), "rds+": Embedding(model=a.model),
                "loss": Loss(model=a.model, without_prompt=False)}  # fmt: skip
    run = Pass(backbone, features, {}, {}, ["target"], a.batch_tokens)
    fit(run, target)
    encoded = backbone.encoder.encode(list(pool["messages"]))
    batches = plan([len(row.ids) for row in encoded], a.batch_tokens)

    def plain() -> None:
        for rows in batches:
            batch = collate(backbone, [encoded[i] for i in rows])
            backbone.states(batch.ids, batch.mask, (-1,))

    def with_feature(names: list[str]) -> None:
        for rows in batches:
            run._rows(collate(backbone, [encoded[i] for i in rows]), names)

    arms = {name: [name] for name in features} | {"trim + rds+": ["trim", "rds+"]}
    ratios: dict[str, list[float]] = {name: [] for name in arms}
    plain()
    for _ in range(a.repeats):
        for name, names in arms.items():
            floor, took = timed(plain), timed(lambda names=names: with_feature(names))
            ratios[name].append(took / floor)
    tokens = sum(len(row.ids) for row in encoded)
    found = {"rows": len(encoded), "tokens": tokens, "threads": torch.get_num_threads(), "device": str(backbone.device),
             "batch_tokens": a.batch_tokens, "repeats": a.repeats,
             "padding": round(sum(len(b) * len(encoded[b[0]].ids) for b in batches) / tokens - 1, 4),
             "ratio_to_plain_forward": {name: {"median": round(statistics.median(r), 3), "min": round(min(r), 3),
                                               "max": round(max(r), 3)} for name, r in ratios.items()}}  # fmt: skip
    print(json.dumps(found, indent=2))
    if a.out:
        a.out.write_text(json.dumps(found, indent=2) + "\n")


def timed(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    np.seterr(all="raise")
    main()
