"""What a run survives: kills, full disks, changed files; and what bad input is told.

    python eval/performance/faults.py [--kill 56] [--full 8] [--quota 8] [--disk 4] [--change 16] [--processes 1] [--minutes 120]

Writes eval/results/reliability.md. The faults come in processes of their own: the undisturbed run is made in one, the hurt
ones in another, so that nothing of the order of a set or a dict can be the same by chance. About 15 seconds a fault.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"
sys.path.insert(0, str(TESTS))
OUT = ROOT / "eval" / "results" / "reliability.md"
KINDS = {
    "kill": "SIGKILL before the N-th call of a stage",
    "full": "no space left at the N-th write of a stage",
    "quota": "no file may grow beyond a few bytes",
    "disk": "a small tmpfs that fills up",
    "change": "a file cut, emptied or with one bit flipped",
}


def hurt(folder: Path, wanted: dict[str, int], seed: int, processes: int, minutes: float) -> list[dict[str, Any]]:
    """The faults of every kind, one by one, as `tests/fault_kinds.py` tells them; seeds are shared out to the processes.

    After `minutes` no further fault is begun; those that were told by then count.
    """
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    running = []
    for process in range(processes):
        command, words = [sys.executable, str(TESTS / "fault_kinds.py"), str(folder / str(process))], []
        for kind, count in wanted.items():
            first, last = (count * part // processes for part in (process, process + 1))
            words.append(f"{kind}:{last - first}@{seed + first}")
        both = f"{shlex.join(command)} > /dev/null && exec {shlex.join([*command, *words])}"
        with (folder / f"{process}.txt").open("w") as out:
            running.append(subprocess.Popen(["sh", "-c", both], env=env, stdout=out, stderr=subprocess.DEVNULL,
                                            start_new_session=True))  # fmt: skip
    until = time.monotonic() + 60 * minutes
    for child in running:
        with suppress(subprocess.TimeoutExpired):
            child.wait(max(0.0, until - time.monotonic()))
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    for place in folder.glob("*/run"):  # a small disk of the fault that was cut short
        subprocess.run(["umount", "-l", str(place)], stderr=subprocess.DEVNULL)
    return told(folder)


def told(folder: Path) -> list[dict[str, Any]]:
    """What the processes wrote, in the order of kinds and seeds."""
    found = [json.loads(text) for file in sorted(folder.glob("*.txt")) for text in file.read_text("utf-8").splitlines()]
    return sorted(found, key=lambda one: (list(KINDS).index(one["kind"]), one["seed"]))


def faults_table(found: list[dict[str, Any]]) -> list[str]:
    """A line per kind and stage or kind of file."""
    cells: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for one in found:
        where = one.get("stage") or f"{one['how']} in {one['file'].split('/')[0]}"
        cells[one["kind"], where].append(one)
    lines = ["| fault | where | tried | struck | survived | files differing | rows lost | finished work made again |",
             "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for (kind, where), some in cells.items():
        lines.append(line(KINDS[kind], where, some))
    return [*lines, line("**all**", "", found)]


def line(kind: str, where: str, some: list[dict[str, Any]]) -> str:
    """One row of the table."""
    struck = sum(one.get("hit", True) for one in some)
    counts = [len(some), struck, sum(one["survived"] for one in some), sum(len(one["differing"]) for one in some),
              sum(one["lost"] for one in some), sum(len(one["again"]) for one in some)]  # fmt: skip
    return f"| {kind} | {where} | " + " | ".join(map(str, counts)) + " |"


def inputs_table() -> list[str]:
    """A line per kind of bad input: tried, and told in one message of the library's own errors."""
    import hostile_inputs

    lines, total = ["| bad input | tried | handled |", "|---|---|---|"], [0, 0]
    with tempfile.TemporaryDirectory() as scratch:
        for number, (group, attempts) in enumerate(hostile_inputs.GROUPS.items()):
            place = Path(scratch) / str(number)
            place.mkdir()
            tried = list(attempts(place, 1.0))
            for name, problem in tried:
                if problem:
                    print(f"{group}: {name}: {problem}", flush=True)
            counts = [len(tried), sum(not problem for _, problem in tried)]
            total = [a + b for a, b in zip(total, counts, strict=True)]
            lines.append(f"| {group} | {counts[0]} | {counts[1]} |")
    return [*lines, f"| **all** | {total[0]} | {total[1]} |"]


def page(found: list[dict[str, Any]], asked: int, minutes: float, inputs: list[str]) -> str:
    """The text of the results."""
    words = shlex.join(["python", "eval/performance/faults.py", *sys.argv[1:]])
    stopped = "" if len(found) == asked else f" The run was stopped then: {asked} were asked for."
    return f"""# What a run survives

```bash
{words}
```

A recipe of every stage on a tiny model (60 rows, shards of 8, one lazy feature, three methods trained), one thread a run. A
fault strikes at a call drawn from its seed, and the same command runs again. "Files differing" and "rows lost" are then counted
against a run that nobody disturbed, over all files of the run; "finished work made again" are shards, selections, adapters,
SAEs and measurements that were complete before the fault and were written once more after it. After a changed file the command
must name it, and what the message says to type is typed; only a changed file that no stage reads (`quarantine.jsonl`), kept
tokens, which are made anew when they are asked for, and seconds, which nobody can tell again, may stay as they are. "Struck"
are faults that the run met: an error where a library expects one, or a disk that was large enough, stops nothing.

{chr(10).join(faults_table(found))}

{len(found)} faults in {minutes:.0f} minutes.{stopped} To repeat one: `python tests/fault_kinds.py FOLDER kill:1@SEED`.

## Bad input

Handled: the message is one of the library's own errors, or the row is in the quarantine with its reason, and good rows beside
it are kept. Random ones are drawn from fixed seeds.

{chr(10).join(inputs)}
"""


def main() -> None:
    """Run all of it and write the page."""
    import fault_kinds

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, count in (("kill", 56), ("full", 8), ("quota", 8), ("disk", 4), ("change", 16), ("seed", 0), ("processes", 1)):
        parser.add_argument(f"--{name}", type=int, default=count)
    parser.add_argument("--minutes", type=float, default=120.0, help="stop then, and tell what was done")
    given = parser.parse_args()
    wanted = {kind: getattr(given, kind) for kind in KINDS}
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        if wanted["disk"] and not fault_kinds.may_mount(Path(scratch)):
            print("no small disk: this process may not mount a tmpfs")
            wanted["disk"] = 0
        found = hurt(Path(scratch), wanted, given.seed, given.processes, given.minutes)
        for one in found:
            print(json.dumps(one)[:600])
    minutes = (time.monotonic() - start) / 60
    OUT.write_text(page(found, sum(wanted.values()), minutes, inputs_table()), "utf-8")
    print(f"written: {OUT.relative_to(ROOT)}")
    sys.exit(not all(one["survived"] for one in found))


if __name__ == "__main__":
    main()
