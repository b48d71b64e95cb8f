"""Killed at any moment, continued by any number of processes: the same bytes."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import tiny
from llmselect.errors import LlmselectError
from llmselect.store import FeatureStore

ENV = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def write(path: Path, chats) -> str:
    path.write_bytes(gzip.compress("".join(json.dumps({"messages": c}) + "\n" for c in chats).encode(), mtime=0))
    return str(path)


@pytest.fixture
def recipe(tmp_path):
    """A recipe of four features over 600 rows in shards of 20."""
    model = tiny.save(tmp_path / "model")
    plan = {
        "name": "resume",
        "model": {"path": str(model), "max_length": 96},
        "pool": {"path": write(tmp_path / "pool.jsonl.gz", tiny.chats(600))},
        "targets": {"t": {"dev": write(tmp_path / "dev.jsonl.gz", tiny.chats(6, 50))}},
        "features": {"rds": {"extractor": "embedding"}, "trim": {"extractor": "trim"}, "loss": {"extractor": "loss"},
                     "grad": {"extractor": "gradient", "k": 8, "dim": 64}},
        "methods": {"random": {"selector": "random"}},
        "shard_rows": 20,
        "batch_tokens": 600,
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(plan))
    return tmp_path


def command(recipe: Path, out: Path, processes: int) -> list[str]:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] if processes > 1 else []
    return [sys.executable, *launch, "-m", "llmselect", "extract", str(recipe / "recipe.yaml"), f"out={out}"]


def kill_after(recipe: Path, out: Path, processes: int, shards: int) -> int:
    """Start, SIGKILL the whole group once `shards` more shards are there; returns how many were finished."""
    count = lambda: len(list(out.glob("features/*/[0-9]*.json")))  # noqa: E731
    before = count()
    child = subprocess.Popen(
        command(recipe, out, processes), env=ENV, start_new_session=True, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    until = time.monotonic() + 120
    while child.poll() is None and count() < before + shards and time.monotonic() < until:
        time.sleep(0.01)
    assert child.poll() is None, "the run ended before it could be killed"
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    return count()


def contents(out: Path) -> dict[str, bytes]:
    files = (f for f in (out / "features").rglob("*") if f.is_file() and not f.name.endswith(".part"))
    return {str(f.relative_to(out)): f.read_bytes() for f in files}


@pytest.mark.timeout(420)
def test_three_kills_and_other_process_counts_give_the_same_bytes(recipe):
    calm, hurt = recipe / "calm", recipe / "hurt"
    subprocess.run(command(recipe, calm, 1), env=ENV, check=True, capture_output=True)
    total = len(list(calm.glob("features/*/[0-9]*.json")))
    done = [kill_after(recipe, hurt, processes, 12) for processes in (1, 2, 1)]
    assert 0 < done[0] < done[1] < done[2] < total
    subprocess.run(command(recipe, hurt, 2), env=ENV, check=True, capture_output=True)
    assert contents(hurt) == contents(calm)


def test_two_processes_train_warm_up_and_read_checkpoints_and_saes(recipe):
    plan = json.loads((recipe / "recipe.yaml").read_text())
    train = {"tokens": 120, "batch_tokens": 40, "checkpoints": 2, "lora": {"r": 2, "target_modules": ["q_proj"]}}
    plan |= {"warmup": {"budget": 9, "train": train}, "sae": {"tokens": 2000, "k": 4, "batch_tokens": 100, "buffer_tokens": 500},
             "features": {"sae": {"extractor": "sae", "max_fvu": None},
                          "less": {"extractor": "gradient", "mode": "lora", "checkpoints": "warmup", "preconditioner": "adam",
                                   "dim": 128, "store": "float32"}}}  # fmt: skip
    plan["pool"]["limit"] = 260
    (recipe / "recipe.yaml").write_text(json.dumps(plan))
    for processes in (1, 2):
        subprocess.run(command(recipe, recipe / f"run{processes}", processes), env=ENV, check=True, capture_output=True)
    one, two = (FeatureStore(recipe / f"run{processes}" / "features") for processes in (1, 2))
    assert one["less"].shape[1] == 256
    # Gradients of two processes are averaged in another order of summation: nearly the same adapter, not the same bits.
    assert np.abs(one["less"][:] - two["less"][:]).max() < 1e-3
    assert abs(one["sae"][:] - two["sae"][:]).max() < 0.02 * one["sae"][:].max()


def test_a_damaged_shard_is_found_named_and_computed_again(recipe):
    out = recipe / "run"
    run = command(recipe, out, 1)
    subprocess.run(run, env=ENV, check=True, capture_output=True)
    before = contents(out)
    shard = out / "features" / "rds" / "00003.safetensors"
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(data)
    truncated = out / "features" / "loss" / "00001.safetensors"
    truncated.write_bytes(truncated.read_bytes()[:40])
    store = FeatureStore(out / "features")
    with pytest.raises(LlmselectError, match=r"00003\.safetensors is damaged"):
        store["rds"][:]
    with pytest.raises(LlmselectError, match=r"00001\.safetensors is damaged"):
        store["loss.nll"][20]
    done = subprocess.run([*run, "--repair"], env=ENV, check=True, capture_output=True, text=True)
    assert "rds: 1 damaged" in done.stderr
    assert contents(out) == before
