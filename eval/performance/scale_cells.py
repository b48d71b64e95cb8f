"""The data and the timed work of `scale.py`: pools, stores, and one cell of each kind."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import numpy as np

from llmselect.arrays import Csr
from llmselect.store import FeatureStore

WIDTH, NONZERO, TARGETS, DIRECTIONS = 4096, 64, 60, 500
WORDS = ["rows", "of", "a", "pool", "are", "short", "here", "and", "few", "words", "make", "them", "long", "enough"]


def write_pool(folder: Path, n: int) -> None:
    """`n` different chats as pool.jsonl and as Parquet files of 100,000 rows in shards/, a little at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    (folder / "shards").mkdir()
    draw, step = random.Random(0), 100_000
    with (folder / "pool.jsonl").open("w") as file:
        for start in range(0, n, step):
            rows = [chat(i, draw) for i in range(start, min(n, start + step))]
            file.writelines(json.dumps(row) + "\n" for row in rows)
            pq.write_table(pa.Table.from_pylist(rows), folder / "shards" / f"{start // step:05d}.parquet", row_group_size=10_000)


def chat(i: int, draw: random.Random) -> dict[str, Any]:
    say = [" ".join(draw.choices(WORDS, k=8)) for _ in range(2)]
    turns = [{"role": "user", "content": f"{i} {say[0]}"}, {"role": "assistant", "content": say[1]}]
    return {"messages": turns, "source": f"s{i % 7}"}


def write_features(folder: Path, n: int, dim: int, plan: list[dict[str, Any]]) -> None:
    """The features that the cells of `plan` read: `dense`, `scores` and `sparse`, with a target each."""
    kinds = {kind_of(made(one["name"])) for one in plan if one["part"] == "select"} - {""}
    for kind in sorted(kinds):
        for name, rows in ((kind, n), (f"{kind}@target", TARGETS)):
            fill(FeatureStore(folder), name, kind, rows, dim)


def made(name: str) -> Any:
    """A selector at its defaults but for what is said: `log_det optimizer=stochastic`."""
    from llmselect.registry import selectors

    name, *options = name.split()
    return selectors.get(name)(**{key: typed(text) for key, _, text in (one.partition("=") for one in options)})


def typed(text: str) -> Any:
    """A number where it is one."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def kind_of(one: Any) -> str:
    """The feature that a selector reads as x, or nothing."""
    from llmselect.selectors._base import inputs_of

    if "x" not in inputs_of(type(one)):
        return ""
    return "sparse" if one.sparse else "scores" if 1 in one.x_ndim else "dense"


def fill(store: FeatureStore, name: str, kind: str, n: int, dim: int) -> None:
    """One feature of `n` rows, a shard at a time."""
    tail = {"dense": ["float16", [dim]], "scores": ["float32", []], "sparse": ["csr:float16", [WIDTH]]}[kind]
    ids = np.arange(2 * n, dtype="<u8").reshape(n, 2) * np.uint64(0x9E3779B97F4A7C15)
    feature = store.create(name, {"arrays": {"value": tail}}, RawIds(ids.view(np.uint8).reshape(n, 16)))
    directions = np.random.default_rng(0).standard_normal((DIRECTIONS, dim)).astype(np.float32)
    for shard in range(feature.shards):
        rng, rows = np.random.default_rng([1, shard, len(name)]), len(feature.rows(shard))
        if kind == "sparse":
            run = WIDTH // NONZERO  # one column of every run of 64: ascending and distinct
            columns = (np.arange(NONZERO) * run + rng.integers(0, run, (rows, NONZERO))).astype(np.int32)
            values, ptr = rng.random(rows * NONZERO, np.float32).astype(np.float16), np.arange(rows + 1, dtype=np.int64) * NONZERO
            feature.write(shard, {"value": Csr(ptr, columns.ravel(), values, WIDTH)})
        elif kind == "scores":
            feature.write(shard, {"value": rng.standard_normal(rows, np.float32)})
        else:
            about = directions[rng.integers(0, DIRECTIONS, rows)] + rng.standard_normal((rows, dim), np.float32)
            feature.write(shard, {"value": about.astype(np.float16)})


def RawIds(raw: np.ndarray) -> Any:
    """Ids of 16 bytes each, without a string per row."""
    from llmselect.arrays import Ids

    return Ids(raw)


def load_cell(about: dict[str, Any]) -> dict[str, Any]:
    """Seconds of `load_pool` from one kind of source."""
    from llmselect.pool import load_pool

    folder = Path(about["folder"])
    source: Any = {"jsonl": folder / "pool.jsonl", "parquet": folder / "shards"}.get(about["name"])
    if source is None:
        from datasets import load_dataset

        files = [str(f) for f in sorted((folder / "shards").iterdir())]
        source = load_dataset("parquet", data_files=files, split="train", streaming=True)
    start = time.process_time()
    pool = load_pool(source, workdir=folder / "read")
    assert len(pool) == about["rows"]
    return {"seconds": round(time.process_time() - start, 3)}


def store_cell(about: dict[str, Any]) -> dict[str, Any]:
    """Seconds to write a dense feature and to read it in blocks, checksums included."""
    store = FeatureStore(Path(about["folder"]) / "written")
    start = time.process_time()
    fill(store, "dense", "dense", about["rows"], about["dim"])
    written = time.process_time()
    total = sum(float(block[:, 0].astype(np.float64).sum()) for _, block in store["dense"].blocks())
    assert np.isfinite(total)
    done = time.process_time()
    store.remove("dense")
    return {"seconds": round(done - start, 3), "write_seconds": round(written - start, 3)}


def select_cell(about: dict[str, Any]) -> dict[str, Any]:
    """Seconds of one selection; a small one before it imports and compiles."""
    one = made(about["name"])
    seconds = 0.0
    for folder, n in (("small", 2000), ("full", about["rows"])):
        inputs = inputs_for(FeatureStore(Path(about["folder"]) / folder), one, n)
        start = time.process_time()
        found = one.select(about["budget"], n=n, **inputs)
        seconds = time.process_time() - start
    return {"seconds": round(seconds, 3), "selected": len(found)}


def inputs_for(store: FeatureStore, one: Any, n: int) -> dict[str, Any]:
    """The inputs that a hook declares."""
    from llmselect.selectors._base import inputs_of

    wanted, kind, rng = inputs_of(type(one)), kind_of(one), np.random.default_rng(1)
    found: dict[str, Any] = {"target_groups": np.repeat(list("abc"), TARGETS // 3), "target_cost": rng.integers(1, 500, TARGETS)}
    if kind:
        found |= {"x": store[kind], "target": store[f"{kind}@target"]}
    found["quality"] = rng.standard_normal(n)
    found |= {"groups": np.array(list("abcdefgh"))[rng.integers(0, 8, n)], "cost": rng.integers(1, 500, n)}
    return {k: v for k, v in found.items() if k in wanted}


CELLS = {"load": load_cell, "store": store_cell, "select": select_cell}
