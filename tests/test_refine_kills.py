"""Iterative refinement stopped at any moment: what was done is kept, and the result is the same to the byte."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_refine import CLUSTERS, STEPS, contents, world

from llmselect import atomic
from llmselect.errors import LlmselectError
from llmselect.refine import Loop, Steps, refine


def saved(folder: Path, steps: Steps = STEPS) -> dict[str, bytes]:
    pool, x, quality, _ = world()
    refine(pool, x, 61, Loop(rounds=3, clusters=CLUSTERS), steps, folder / "state", quality=quality).save(folder / "selection")
    return contents(folder)


def test_a_failure_before_or_after_any_state_is_written_changes_nothing(tmp_path, monkeypatch):
    calm = saved(tmp_path / "calm")
    states = [name[6:] for name in calm if name.startswith("state/") and name.endswith(".json")]
    assert len(states) == 2 + 5 * 2 + 1
    write = atomic.write_json
    for name in states:
        for after in (False, True):
            folder, done = tmp_path / f"{name}-{after}".replace("/", "-"), []

            def failing(path, value, name=name, after=after, done=done):
                if str(path).endswith(f"state/{name}"):
                    if after:
                        write(path, value)
                    raise RuntimeError(name)
                write(path, value)
                done.append(path)

            monkeypatch.setattr(atomic, "write_json", failing)
            with pytest.raises(RuntimeError, match=name):
                saved(folder)
            stamps = {path: path.stat().st_mtime_ns for path in done}
            monkeypatch.setattr(atomic, "write_json", write)
            assert saved(folder) == calm
            assert {path: path.stat().st_mtime_ns for path in done} == stamps  # what was done is not done again


KILLED = """
import sys, time
from pathlib import Path
import test_refine as t
from test_refine_kills import saved

folder, where = Path(sys.argv[1]), sys.argv[2]

def slow(name, step):
    def inner(at, *rest):
        if where == f"{name}-{at.number}":
            (folder / "here").touch()
            time.sleep(600)
        return step(at, *rest)
    return inner

saved(folder, t.Steps(slow("train", t.train), slow("generate", t.generate), slow("score", t.score)))
"""


@pytest.mark.timeout(300)
def test_sigkill_in_every_step_changes_no_byte(tmp_path):
    """One run is killed in each step of each round in turn, and goes on."""
    calm, hurt = saved(tmp_path / "calm"), tmp_path / "hurt"
    hurt.mkdir()
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    for where in [f"{name}-{number}" for number in (1, 2) for name in ("train", "generate", "score")]:
        command = [sys.executable, "-c", KILLED, str(hurt), where]
        child = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}, stderr=subprocess.DEVNULL)
        until = time.monotonic() + 60
        while not (hurt / "here").exists() and child.poll() is None and time.monotonic() < until:
            time.sleep(0.02)
        assert child.poll() is None, f"the run ended before it was in {where}"
        child.send_signal(signal.SIGKILL)
        child.wait()
        (hurt / "here").unlink()
    assert saved(hurt) == calm


def test_changed_state_is_named_and_made_again(tmp_path):
    calm = saved(tmp_path / "calm")
    names = [name for name in calm if name.startswith("state/") and name.endswith((".json", ".npy"))]
    assert "state/labels.npy" in names and len(names) > 12
    for i, name in enumerate(names):
        folder = tmp_path / str(i)
        saved(folder)
        data = bytearray((folder / name).read_bytes())
        data[-9] ^= 1
        (folder / name).write_bytes(data)
        with pytest.raises(LlmselectError, match=rf"{Path(name).name} is damaged.*; delete {folder / 'state'} and run again"):
            saved(folder)
        shutil.rmtree(folder / "state")
        assert saved(folder) == calm
