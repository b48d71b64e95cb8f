"""The faults: SIGKILL, a disk that is full, a limit on the size of files, files that are cut or changed.

    python tests/fault_kinds.py FOLDER kill:5 full:2 quota:2 change:4@100

prints one JSON object a fault: five kills of the seeds 0 to 4, four changes of the seeds 100 to 103. FOLDER is kept
between calls: the undisturbed run is made once.
"""

from __future__ import annotations

import errno
import importlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from faults import FILES, STAGES, TIMES, TOKENS, UNREAD, WRITES, Yard, at_call, at_stage, contents, finished


def kill(yard: Yard, seed: int) -> dict[str, Any]:
    """SIGKILL before some call of a stage: every second time before one that touches files."""
    draw = random.Random(f"kill {seed}")
    stage, files = list(STAGES)[seed % len(STAGES)], draw.random() < 0.5
    at = draw.randint(1, yard.counts[stage]["files" if files else "all"])
    yard.reset(yard.folder / "before" / stage)
    code, said = yard.go(lambda: at_call(stage, at, FILES if files else None, lambda: os.kill(os.getpid(), signal.SIGKILL)))
    found = {"kind": "kill", "seed": seed, "stage": stage, "at": at, "of": "file calls" if files else "calls"}
    found["wrong"] = "" if code == -signal.SIGKILL else f"was not killed: {code} {said[-500:]}"
    return yard.judge(found, finished(yard.run))


def told_clearly(code: int, said: str, kept_results: bool = False) -> str:
    """What is wrong with the way a failure was told; empty when it is one message and exit code 1 or 2."""
    if kept_results and code == 0 and "no report:" in said:
        return ""
    lines = [line for line in said.splitlines() if line.startswith("llmselect: ")]
    return "" if code in (1, 2) and len(lines) == 1 and "Traceback" not in said else f"exit {code}: {said[-1500:]}"


def disk(yard: Yard, seed: int) -> dict[str, Any]:
    """A real small disk (tmpfs) with less room than the run needs; later it is made larger."""
    draw = random.Random(f"disk {seed}")
    stage = list(STAGES)[seed % len(STAGES)]
    state = yard.folder / "before" / stage
    size = lambda folder: sum((f.stat().st_size + 8191) // 4096 * 4096 for f in folder.rglob("*"))  # noqa: E731
    room = max(size(state), 4096) + draw.randrange(4096, max(8192, size(yard.calm) - size(state)))
    shutil.rmtree(yard.run, ignore_errors=True)
    yard.run.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", str(yard.run)], check=True)
    try:
        if state.exists():
            shutil.copytree(state, yard.run, dirs_exist_ok=True)
        code, said = yard.go()
        found: dict[str, Any] = {"kind": "disk", "seed": seed, "stage": stage, "room": room}
        found["hit"] = code != 0 or "no report:" in said
        found["wrong"] = told_clearly(code, said, True) if found["hit"] else ""
        subprocess.run(["mount", "-o", "remount,size=256m", str(yard.run)], check=True)
        return yard.judge(found, finished(yard.run))
    finally:
        subprocess.run(["umount", "-l", str(yard.run)], check=True)


def may_mount(folder: Path) -> bool:
    """Whether this process may mount a small disk."""
    place = folder / "mount"
    place.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)], capture_output=True)
    return done.returncode == 0 and subprocess.run(["umount", str(place)]).returncode == 0


def full(yard: Yard, seed: int) -> dict[str, Any]:
    """The disk is full at some writing call of a stage."""
    draw = random.Random(f"full {seed}")
    stage = list(STAGES)[seed % len(STAGES)]
    at = draw.randint(1, yard.counts[stage]["writes"])

    def fail() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    yard.reset(yard.folder / "before" / stage)
    code, said = yard.go(lambda: at_call(stage, at, WRITES, fail))
    found = {"kind": "full", "seed": seed, "stage": stage, "at": at}
    # An error where the standard library expects one is mended by it: then the run is simply done.
    found["hit"] = code != 0 or "no report:" in said
    mended = code == 0 and contents(yard.run) == yard.expected
    return yard.judge({**found, "wrong": "" if mended else told_clearly(code, said, stage == "report")}, finished(yard.run))


def quota(yard: Yard, seed: int) -> dict[str, Any]:
    """No file may grow beyond a few bytes (RLIMIT_FSIZE): writes in libraries of any language fail midway."""
    draw = random.Random(f"quota {seed}")
    stage, most = list(STAGES)[seed % len(STAGES)], int(2 ** draw.uniform(0, 14))
    done = yard.folder / "all is said"
    done.unlink(missing_ok=True)
    limit = lambda: at_stage(stage, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY)))  # noqa: E731
    yard.reset(yard.folder / "before" / stage)
    pipe = yard.folder / "said"
    code, said = yard.go(lambda: (limit(), said_through(pipe, done)))
    until = time.monotonic() + 60
    while not done.exists() and time.monotonic() < until:  # by another process, which may be behind
        time.sleep(0.01)
    said = pipe.read_text("utf-8", "replace")
    found = {"kind": "quota", "seed": seed, "stage": stage, "bytes": most}
    found["hit"] = code != 0 or "no report:" in said
    mended = code == 0 and contents(yard.run) == yard.expected
    return yard.judge({**found, "wrong": "" if mended else told_clearly(code, said, True)}, finished(yard.run))


def said_through(file: Path, done: Path) -> None:
    """Let another process write what this one says: it is under no limit."""
    read, write = os.pipe()
    if os.fork() == 0:
        os.close(write)
        with file.open("wb") as out:
            while part := os.read(read, 1 << 16):
                out.write(part)
        done.touch()
        os._exit(0)
    os.close(read)
    os.dup2(write, 1)
    os.dup2(write, 2)


def change(yard: Yard, seed: int) -> dict[str, Any]:
    """One file of a finished run is cut or has a byte changed; what the error says to type is typed."""
    draw = random.Random(f"change {seed}")
    yard.reset(yard.calm)
    name = sorted(yard.expected)[draw.randrange(len(yard.expected))]
    data, how = bytearray((yard.run / name).read_bytes()), draw.choice(["flip", "flip", "cut", "empty"])
    at = draw.randrange(len(data)) if data else 0
    if how == "flip" and data:
        data[at] ^= 1 << draw.randrange(8)
    (yard.run / name).write_bytes(data if how == "flip" else data[: at if how == "cut" else 0])
    found = {"kind": "change", "seed": seed, "file": name, "how": how, "at": at, "wrong": ""}
    kept = name.startswith(TOKENS)
    found["apart"] = apart(name)
    if kept:  # train and measure again, or nobody would read them
        for folder in ("adapters", "evaluation"):
            shutil.rmtree(yard.run / folder)
    elif name.startswith("features/"):  # select again
        for folder in (yard.run / "selections").iterdir():
            shutil.rmtree(folder) if folder.is_dir() else folder.unlink()
    code, said = yard.go()
    if code == 0 and not kept and name.startswith("features/") and contents(yard.run).get(name) != yard.expected[name]:
        remedy(yard, "--repair")  # no method reads it: damage is found on request
    for _ in range(3):  # ids and shards of one feature are dropped by one repair, other files one by one
        if code == 0:
            break
        found["wrong"] = found["wrong"] or told_clearly(code, said)
        found["told"] = next((line for line in said.splitlines() if line.startswith("llmselect: ")), "")
        remedy(yard, found["told"])
        code, said = yard.go()
    return yard.judge(found)


def apart(name: str) -> list[str]:
    """The files that may differ once this one was changed."""
    if name in TIMES:
        return [name, "results.json", "results.md", "report.html"]
    return [name] if name.startswith(TOKENS) or name.endswith(UNREAD) else []


def remedy(yard: Yard, told: str) -> None:
    """Do what a message says: delete what it names, or extract with --repair."""
    if "--repair" in told:
        yard.go(lambda: sys.argv, "extract", "--repair")
    for path in re.findall(r"delete (\S+?)(?=,|;|:|\.$| and|$)|and (/\S+) and run again", told):
        place = Path(path[0] or path[1])
        if yard.run in place.parents:
            shutil.rmtree(place) if place.is_dir() else place.unlink(missing_ok=True)


KINDS = {"kill": kill, "full": full, "quota": quota, "disk": disk, "change": change}


def campaign(folder: Path, wanted: list[tuple[str, int, int]]) -> list[dict[str, Any]]:
    """So many faults of each kind from a first seed on; one JSON line each."""
    for heavy in "torch transformers datasets trl peft sae_lens accelerate jinja2 numba scipy.sparse faiss".split():
        importlib.import_module(heavy)
    yard, found = Yard(folder), []
    for kind, count, first in wanted:
        for one in range(first, first + count):
            found.append(KINDS[kind](yard, one))
            sys.stdout.write(json.dumps(found[-1]) + "\n")
            sys.stdout.flush()
    return found


if __name__ == "__main__":
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", WANDB_MODE="disabled")
    asked = []
    for word in sys.argv[2:]:
        name, _, amount = word.partition(":")
        number, _, start = amount.partition("@")
        asked.append((name, int(number), int(start or 0)))
    sys.exit(not all(one["survived"] for one in campaign(Path(sys.argv[1]).resolve(), asked)))
