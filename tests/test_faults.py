"""Killed, out of disk, with changed bytes: the next command ends with the bytes of the run that nobody disturbed.

What a failing fault was is in the message, with its seed: `python tests/fault_kinds.py FOLDER kill:1@17` repeats it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import tiny

HERE = Path(__file__).parent
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
ENV["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])


@pytest.fixture(scope="module")
def yard(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("yard")


def hurt(yard: Path, seed: int, **kinds: int) -> list[dict]:
    words = [f"{kind}:{count}@{seed}" for kind, count in kinds.items()]
    command = [sys.executable, str(HERE / "fault_kinds.py"), str(yard), *words]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]  # libraries print, too
    assert len(found) == sum(kinds.values()), done.stderr[-3000:]
    return found


def survived(found: list[dict]) -> None:
    print(*found, sep="\n")  # noqa: T201  seeds and moments, for who repeats a failure
    assert [one for one in found if not one["survived"]] == []


@pytest.mark.timeout(900)
def test_five_kills_and_a_changed_file_leave_no_trace(yard):
    found = hurt(yard, 3, kill=5, change=1)
    survived(found)
    assert [one["stage"] for one in found if one["kind"] == "kill"] == ["extract", "select", "train", "evaluate", "report"]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_many_kills_in_every_stage_leave_no_trace(yard):
    found = hurt(yard, 100, kill=56)
    survived(found)
    stages = [one["stage"] for one in found]
    assert len(set(stages)) == 8 and all(stages.count(stage) == 7 for stage in stages)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_full_disks_and_changed_files_leave_no_trace(yard):
    import fault_kinds

    survived(hurt(yard, 200, full=16, quota=16, change=60))
    if not fault_kinds.may_mount(yard):
        pytest.skip("this process may not mount a small disk; the other full disks were tried")
    survived(hurt(yard, 200, disk=8))


def accelerate(recipe: Path, out: Path) -> list[str]:
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    return [*launch, "--mixed_precision", "no", "--dynamo_backend", "no", "-m", "llmselect", "extract", str(recipe), f"out={out}"]


def ranks(launcher: int) -> dict[int, int]:
    """RANK → process id of the processes below a launcher."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            words = (folder / "environ").read_bytes().split(b"\0")
        except (OSError, IndexError):
            continue
        rank = [word for word in words if word.startswith(b"RANK=")]
        if parent == launcher and rank:
            found[int(rank[0][5:])] = int(folder.name)
    return found


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_dies_ends_the_launch_and_costs_nothing(tmp_path, rank):
    lines = "".join(json.dumps({"messages": chat}) + "\n" for chat in tiny.chats(600))
    (tmp_path / "pool.jsonl").write_text(lines)
    (tmp_path / "dev.jsonl").write_text("".join(lines.splitlines(keepends=True)[:6]))
    plan = {
        "name": "rank", "model": {"path": str(tiny.save(tmp_path / "model")), "max_length": 96},
        "pool": {"path": str(tmp_path / "pool.jsonl"), "decontaminate": False},
        "targets": {"t": {"dev": str(tmp_path / "dev.jsonl")}}, "methods": {"random": {"selector": "random"}},
        "features": {"trim": {"extractor": "trim"}, "grad": {"extractor": "gradient", "k": 8, "dim": 64}},
        "shard_rows": 10, "batch_tokens": 300,
    }  # fmt: skip
    recipe, hurt, calm = tmp_path / "recipe.yaml", tmp_path / "hurt", tmp_path / "calm"
    recipe.write_text(json.dumps(plan))
    with (tmp_path / "said").open("wb") as said:
        launcher = subprocess.Popen(accelerate(recipe, hurt), env=ENV, stdout=said, stderr=said, start_new_session=True)
    try:
        shards = lambda: sorted(hurt.glob("features/grad/[0-9]*.json"))  # noqa: E731
        until = time.monotonic() + 200
        while len(shards()) < 6 and launcher.poll() is None and time.monotonic() < until:
            time.sleep(0.02)
        assert launcher.poll() is None and len(shards()) >= 6, (tmp_path / "said").read_text()[-3000:]
        below = ranks(launcher.pid)
        assert sorted(below) == [0, 1]
        os.kill(below[rank], signal.SIGKILL)
        assert launcher.wait(timeout=120) != 0  # the other rank does not wait for ever
    finally:
        if launcher.poll() is None:
            os.killpg(launcher.pid, signal.SIGKILL)
    kept = {file: file.stat().st_mtime_ns for file in shards()}
    for out in (hurt, calm):
        alone = [sys.executable, "-m", "llmselect", "extract", str(recipe), f"out={out}"]
        subprocess.run(alone, env=ENV, check=True, capture_output=True)
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
    files = [f.relative_to(calm) for f in (calm / "features").rglob("*") if f.is_file()]
    assert len(files) > 100 and all((hurt / f).read_bytes() == (calm / f).read_bytes() for f in files)
