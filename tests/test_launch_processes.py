"""The same selections from any number of processes, changed on resume, with other batches, shards and threads."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import launches
from llmselect.prepare import prepare
from llmselect.recipe import load_recipe
from llmselect.stages import Run, extract_stage, select_stage

FEATURES = {"rds": {"extractor": "embedding"}, "loss": {"extractor": "loss"}}
FEW = ("quad", "similarity")


def close(one: Path, other: Path) -> None:
    """Features to the tolerance of their type; integers that explain a row (`top_…`) may name an equal one."""
    for name, (dtype, share) in launches.feature_differences(one, other).items():
        if dtype in launches.TOLERANCE:
            assert share <= launches.TOLERANCE[dtype], name


def test_two_processes_with_other_batches_and_shards_select_the_same(tmp_path, tiny_model):
    few: dict[str, Any] = {"methods": {name: launches.method(name) for name in FEW}, "features": FEATURES, "budget": 10}
    made = Run(load_recipe(launches.write_recipe(tmp_path, tiny_model, 60, out=str(tmp_path / "one"), **few)))
    for stage in (prepare, extract_stage, select_stage):
        stage(made)
    two = launches.run(tmp_path / "recipe.yaml", tmp_path / "two", processes=2, by="torchrun", batch_tokens=150, shard_rows=16)
    assert launches.selection_differences(made.folder, two, FEW) == []
    close(made.folder, two)


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_every_selector_from_any_launch(tmp_path, tiny_model):
    recipe = launches.write_recipe(tmp_path, tiny_model)
    one = launches.run(recipe, tmp_path / "one")
    for processes in (2, 3, 4):
        several = launches.run(recipe, tmp_path / str(processes), processes=processes)
        assert launches.selection_differences(one, several) == []
        assert {share for _, share in launches.feature_differences(one, several).values()} == {0.0}
    for name, changed in {"batch": {"batch_tokens": 150}, "shard": {"shard_rows": 64}, "threads": {"threads": 3}}.items():
        other = launches.run(recipe, tmp_path / name, processes=2, **changed)
        assert launches.selection_differences(one, other) == []
        close(one, other)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_another_number_of_processes_on_resume(tmp_path, tiny_model):
    recipe = launches.write_recipe(tmp_path, tiny_model)
    one, out = launches.run(recipe, tmp_path / "one"), tmp_path / "hurt"
    done = [killed(recipe, out, processes, 6) for processes in (3, 1, 4)]
    assert 0 < done[0] < done[1] < done[2] < len(list(one.glob("features/*/[0-9]*.json")))
    launches.run(recipe, out, processes=2)
    assert launches.selection_differences(one, out) == []
    assert {share for _, share in launches.feature_differences(one, out).values()} == {0.0}


def killed(recipe: Path, out: Path, processes: int, shards: int) -> int:
    """Start, kill the whole group once `shards` more shards are there; returns how many were finished."""
    count = lambda: len(list(out.glob("features/*/[0-9]*.json")))  # noqa: E731
    before, env = count(), {**os.environ, "OMP_NUM_THREADS": "1"}
    command = launches.launched(recipe, out, "extract", processes)
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    child = subprocess.Popen(command, env=env, start_new_session=True, **quiet)
    until = time.monotonic() + 120
    while child.poll() is None and count() < before + shards and time.monotonic() < until:
        time.sleep(0.01)
    assert child.poll() is None, "the run ended before it could be killed"
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    return count()


def test_the_comparison_sees_another_order(tmp_path):
    from llmselect.selection import Selection

    for name, order in (("a", [0, 1]), ("b", [1, 0]), ("c", [0, 1])):
        ids = [f"{i:032x}" for i in order]
        Selection(np.array(order), 3, None, None, {}, True, {}, ids).save(tmp_path / name / "selections" / "m" / "seed-0")
    a, b, c = (tmp_path / name for name in "abc")
    assert launches.selection_differences(a, b, ["m"]) == ["m"] and launches.selection_differences(a, c, ["m"]) == []
