"""One recipe with every registered selector, started in different ways, and what differs between its runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import tiny
from llmselect.registry import selectors
from llmselect.selection import Selection
from llmselect.selectors._base import inputs_of
from llmselect.store import FeatureStore

FEATURES = {"rds": {"extractor": "embedding"}, "trim": {"extractor": "trim"}, "loss": {"extractor": "loss"},
            "grams": {"extractor": "ngram"}, "grad": {"extractor": "gradient", "k": 8, "dim": 64}}  # fmt: skip
# Largest difference of a feature between launches, as a share of its largest value: rounding to the type it is stored in.
TOLERANCE = {"float16": 2e-3, "float32": 2e-5}


def write_recipe(folder: Path, model: Path, rows: int = 160, **more: Any) -> Path:
    """A recipe that extracts five features and selects by every registered selector; `more` goes into it."""

    def lines(name: str, chats: list) -> str:
        text = "".join(json.dumps({"messages": c, "source": f"s{i % 3}"}) + "\n" for i, c in enumerate(chats))
        (folder / name).write_text(text)
        return str(folder / name)

    plan = {"name": "launch", "model": {"path": str(model), "max_length": 96},
            "pool": {"path": lines("pool.jsonl", tiny.chats(rows))},
            "targets": {t: {"dev": lines(f"{t}.jsonl", tiny.chats(4, seed))} for t, seed in (("t", 5000), ("u", 6000))},
            "features": FEATURES, "methods": {name: method(name) for name in selectors.names()}, "budget": 24,
            "batch_tokens": 600, "shard_rows": 20, **more}  # fmt: skip
    (folder / "recipe.yaml").write_text(json.dumps(plan))
    return folder / "recipe.yaml"


def method(name: str) -> dict[str, str]:
    """A selector with features that suit its inputs."""
    one: Any = selectors.get(name)
    wanted, found = inputs_of(one), {"selector": name}
    if "x" in wanted:
        found["x"] = "grams" if one.sparse else "rds" if 2 in one.x_ndim else "loss.nll"
    if "quality" in wanted:
        found["quality"] = "loss.nll"
    return found


def launched(recipe: Path, out: Path, stage: str, processes: int = 1, by: str = "accelerate", **changed: int) -> list[str]:
    """The command that runs a stage on this many processes; `accelerate launch --cpu` would start one (accelerate#2741)."""
    module = ["-m", "llmselect", stage, str(recipe), f"out={out}", *(f"{k}={v}" for k, v in changed.items())]
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    if by == "accelerate":
        several = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes), "--num_machines", "1",
                   "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]  # fmt: skip
    return [sys.executable, *(several if processes > 1 else []), *module]


def run(recipe: Path, out: Path, stage: str = "select", processes: int = 1, threads: int = 1, **changed: Any) -> Path:
    """Run a stage to its end and return its folder."""
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(launched(recipe, out, stage, processes, **changed), env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return out


def feature_differences(one: Path, other: Path) -> dict[str, tuple[str, float]]:
    """Array → (dtype, largest difference as a share of the largest value), of every feature of two runs."""
    a, b, found = FeatureStore(one / "features"), FeatureStore(other / "features"), {}
    assert a.names() == b.names()
    for feature in a.names():
        for array, (dtype, _) in a.open(feature).spec["arrays"].items():
            x, y = (store[f"{feature}.{array}"][:] for store in (a, b))
            x, y = (np.asarray(v.toarray() if hasattr(v, "toarray") else v, np.float64) for v in (x, y))
            scale = float(np.abs(x).max()) or 1.0
            found[f"{feature}.{array}"] = dtype.removeprefix("csr:"), float(np.abs(x - y).max()) / scale
    return found


def selection_differences(one: Path, other: Path, expected: Sequence[str] = ()) -> list[str]:
    """The methods whose selections are not the same rows in the same order."""
    places = sorted((one / "selections").glob("*/seed-*"))
    assert [place.parent.name for place in places] == sorted(expected or selectors.names())
    theirs = [other / "selections" / place.relative_to(one / "selections") for place in places]
    pairs = [(Selection.load(a), Selection.load(b)) for a, b in zip(places, theirs, strict=True)]
    return [place.parent.name for place, (a, b) in zip(places, pairs, strict=True) if list(a.ids or ()) != list(b.ids or ())]
