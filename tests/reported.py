"""A large finished run without a model's passes: synthetic rows, features and selections in their places."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from llmselect import account, config
from llmselect.recipe import Recipe
from llmselect.selection import Selection
from llmselect.store import FeatureStore


def arrow(folder: Path, columns: dict[str, list]) -> None:
    """Rows as the one file of a pool's folder."""
    folder.mkdir(parents=True)
    table = pa.table(columns)
    with pa.OSFile(str(folder / "pool.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)


def feature(store: FeatureStore, name: str, ids: list[str], arrays: dict[str, np.ndarray], **spec) -> None:
    """A complete feature of given arrays."""
    told = {one: [str(values.dtype), list(values.shape[1:])] for one, values in arrays.items()}
    made = store.create(name, {"arrays": told, "shard_rows": 16_384, **spec}, ids)
    for shard in range(made.shards):
        rows = made.rows(shard)
        made.write(shard, {one: values[rows.start : rows.stop] for one, values in arrays.items()})


def chat(i: int, said: list[str]) -> list[dict[str, str]]:
    """Some 1,300 characters that no other row has."""
    return [{"role": "user", "content": f"{i} {said[i % 1000]}"}, {"role": "assistant", "content": said[7 * i % 1000] * 3}]


def large_run(folder: Path, model: Path, n: int, budget: int = 5000) -> Path:
    """A run of `n` rows with a random, a scored and a similarity selection; returns its folder."""
    rng = np.random.default_rng(0)
    ids = [f"{i:032x}" for i in range(n)]
    words = np.array("alpha beta gamma delta epsilon zeta eta theta iota kappa".split())
    said = [" ".join(words[row]) for row in rng.integers(0, 10, (1000, 60))]
    arrow(folder / "pool", {"id": ids, "messages": [chat(i, said) for i in range(n)], "source": [f"s{i % 40}" for i in range(n)]})
    np.save(folder / "pool" / "usable.npy", np.arange(n))
    dev, t = [f"{i:032x}" for i in range(n, n + 8)], ["t"] * 8
    arrow(folder / "targets/t", {"id": dev, "messages": [chat(i, said) for i in range(8)], "source": t, "group": t})
    store, x, target = FeatureStore(folder / "features"), rng.normal(size=(n, 32)), rng.normal(size=(8, 32))
    feature(store, "emb", ids, {"value": x.astype(np.float16)}, extractor="embedding")
    feature(store, "emb@target", dev, {"value": target.astype(np.float16)}, extractor="embedding")
    feature(store, "tokens", ids, {"supervised": rng.integers(1, 2000, n).astype(np.int32)}, extractor="tokens")
    score = rng.normal(size=n)
    best, near = np.argsort(-score)[:budget], np.argsort(-(x @ target[0]))[:budget]
    evidence = {"nearest": np.zeros(budget, np.int64), "cosine": rng.random(budget)}
    for name, made in {
        "random": Selection(rng.choice(n, budget, replace=False), n, provenance={"selector": "random"}),
        "scored": Selection(best, n, score, provenance={"selector": "topk"}),
        "near": Selection(near, n, x @ target[0], evidence=evidence, provenance={"selector": "similarity"}),
    }.items():
        made.save(folder / "selections" / name / "seed-0")
    plan = {"name": "large", "model": {"path": str(model)}, "pool": {"path": "pool.jsonl"}, "targets": {"t": {"dev": "t.jsonl"}},
            "methods": {name: {"selector": "random"} for name in ("random", "scored", "near")}}  # fmt: skip
    (folder / "config.yaml").write_text(config.dump_yaml(config.to_dict(config.from_dict(Recipe, plan))))
    account.write(folder, {"key": ""}, [])
    return folder
