"""Runs that are hurt on purpose: killed, out of disk, with changed bytes. What is left, and what the next command makes of it.

One process imports the libraries and forks: each child is the command `llmselect run` on a tiny recipe of every stage. A
fault comes at the N-th call of a stage, counted by `sys.setprofile`, N drawn from the seed: the seed means the same moment
again. Clocks stand still, so that every byte of a run can be compared with that of the run that nobody disturbed.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import tiny

STAGES = {
    "prepare": ("prepare", "prepare"), "warm-up": ("stages", "_warm_up"), "sae": ("stages", "sae_stage"),
    "extract": ("stages", "extract"), "select": ("stages", "select_stage"), "train": ("comparison", "train_stage"),
    "evaluate": ("comparison", "evaluate_stage"), "report": ("report", "write_report"),
}  # fmt: skip
WRITES = {"mkstemp", "write", "fsync", "mkdir", "replace", "open", "save", "link", "mkdtemp"}
FILES = WRITES | {"unlink", "rmdir", "close", "read", "stat", "scandir", "truncate"}
UNREAD = "quarantine.jsonl"  # by any stage: a changed byte harms nothing else
TOKENS = "features/.tokens/"  # made again when they are asked for
TIMES = {"timings.json", "selections/seconds.json"}  # noticed, but nothing can tell them again


def recipe(folder: Path) -> Path:
    """A recipe with every stage, in seconds: 60 rows in shards of 8, a lazy feature, two trainings."""

    def rows(name: str, count: int, seed: int) -> str:
        lines = [json.dumps({"messages": c, "source": f"s{i % 3}"}) for i, c in enumerate(tiny.chats(count, seed))]
        bad = ["{", '{"messages": []}'] if name == "pool" else []
        (folder / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in [*lines, *bad, *lines[:2]]))
        return str(folder / f"{name}.jsonl")

    adapter = {"r": 2, "target_modules": ["q_proj"]}
    plan = {
        "name": "faults", "out": str(folder / "run"),
        "model": {"path": str(tiny.save(folder / "model", layers=2)), "max_length": 96},
        "pool": {"path": rows("pool", 60, 0), "max_invalid": 0.1},
        "targets": {"t": {"dev": rows("dev", 4, 50), "test": rows("test", 5, 70)}},
        "warmup": {"budget": "20%", "train": {"tokens": 80, "batch_tokens": 40, "lora": adapter, "checkpoints": 1}},
        "sae": {"tokens": 900, "k": 4, "batch_tokens": 100, "buffer_tokens": 300, "expansion": 2, "held_out_rows": 5},
        "features": {"emb": {"extractor": "embedding"}, "trim": {"extractor": "trim", "adapter": "warmup"},
                     "sae": {"extractor": "sae", "max_fvu": None},
                     "inf": {"extractor": "influence", "fisher_rows": 8, "lazy": True}},
        "methods": {"random": {"selector": "random"}, "trim": {"selector": "topk", "x": "trim"},
                    "quad": {"selector": "quad", "x": "emb", "quality": "inf", "clusters": 3, "least": 4}},
        "dedup": {"x": "emb", "threshold": 0.999}, "budget": 6, "shard_rows": 8, "full": False,
        "train": {"tokens": 60, "batch_tokens": 30, "lora": adapter},
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(json.dumps(plan))
    return folder / "recipe.yaml"


def contents(run: Path) -> dict[str, str]:
    """Digest of every file of a run, but for the parts that a kill leaves beside them."""
    files = [f for f in run.rglob("*") if f.is_file() and ".part" not in str(f.relative_to(run))]
    return {str(f.relative_to(run)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def finished(run: Path) -> dict[str, int]:
    """Pieces of work that are complete, with the time of their writing: no later command may make them again."""
    units = [f for f in run.glob("features/**/*.safetensors") if f.with_suffix(".json").exists()]
    for pattern in ("selections/*/*/selection.json", "adapters/*/*/train.json", "*/train*.json", "evaluation/**/*.json"):
        units += run.glob(pattern)
    return {str(f.relative_to(run)): f.stat().st_mtime_ns for f in units}


def rows_lost(run: Path) -> int:
    """Rows read of which no file tells what became of them."""
    account = json.loads((run / "rows.json").read_text())
    lost = account["pool"]["kept"] - account["usable"] - sum(account["unusable"].values())
    for side in [value for name, value in account.items() if isinstance(value, dict) and "read" in value]:
        lost += abs(side["read"] - side["kept"] - side["invalid"] - side["duplicates"] - side["contaminated"])
    entries = len((run / "quarantine.jsonl").read_bytes().splitlines())
    pool = account["pool"]
    return lost + abs(entries - pool["invalid"] - pool["duplicates"] - pool["contaminated"] - sum(account["unusable"].values()))


def fork(work: Callable[[], None], log: Path) -> int:
    """Run `work` in a child that writes to `log`; the exit code, −signal, or 70 for a traceback."""
    pid = os.fork()
    if pid == 0:
        code, handle = 70, os.open(log, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        try:
            work()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        except BaseException:
            traceback.print_exc()
        finally:
            with suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def command(*words: str) -> None:
    """The command line, with clocks that stand still and an SAE that is checkpointed as often as can be."""
    from llmselect import cli
    from llmselect.sae import training

    time.monotonic = lambda: 0.0
    training.CHECKPOINT_SECONDS = -1.0
    sys.argv = ["llmselect", *words]
    cli.main()


def at_stage(stage: str, enter: Callable[[], None], leave: Callable[[], None] = lambda: None) -> None:
    """Call `enter` when the stage begins for the first time and `leave` when it ends."""
    module, name = STAGES[stage]
    home = importlib.import_module(f"llmselect.{module}")
    original, begun = getattr(home, name), []

    def stand_in(*args: Any, **kwargs: Any) -> Any:
        if begun:
            return original(*args, **kwargs)
        begun.append(True)
        enter()
        try:
            return original(*args, **kwargs)
        finally:
            leave()

    setattr(home, name, stand_in)


def is_call(event: str, arg: Any, of: set[str] | None) -> bool:
    """Whether a profiler's event is a call, of a function of these names if some are given."""
    return event == "c_call" and arg.__name__ in of if of else event in ("call", "c_call")


def at_call(stage: str, number: int, of: set[str] | None, act: Callable[[], None]) -> None:
    """Do `act` before the call of this number in a stage."""
    left = [number]

    def seen(frame: Any, event: str, arg: Any) -> None:
        if is_call(event, arg, of):
            left[0] -= 1
            if left[0] == 0:
                act()

    at_stage(stage, lambda: profile(seen), lambda: profile(None))


def profile(seen: Any) -> None:
    """Tell `seen` of the calls of this thread, and of those that begin from now on: of reading and writing beside the model."""
    threading.setprofile(seen)
    sys.setprofile(seen)


class Yard:
    """A folder with a recipe, the undisturbed run of it, the state before every stage and the calls that a stage makes."""

    def __init__(self, folder: Path):
        self.folder, self.run, self.calm, self.log = folder, folder / "run", folder / "calm", folder / "log.txt"
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "counts.json").exists():
            recipe(folder)
            assert fork(self._calm, self.log) == 0, self.log.read_text()
            shutil.copytree(self.run, self.calm, dirs_exist_ok=True)
        self.counts = json.loads((folder / "counts.json").read_text())
        self.expected = contents(self.calm)

    def _calm(self) -> None:
        counts: dict[str, dict[str, int]] = {}
        for stage in STAGES:
            here = counts[stage] = {"all": 0, "files": 0, "writes": 0}

            def seen(frame: Any, event: str, arg: Any, here: dict[str, int] = here) -> None:
                for key, of in (("all", None), ("files", FILES), ("writes", WRITES)):
                    here[key] += is_call(event, arg, of)

            def enter(stage: str = stage, seen: Any = seen) -> None:
                if self.run.exists():
                    shutil.copytree(self.run, self.folder / "before" / stage)
                profile(seen)

            at_stage(stage, enter, lambda: profile(None))
        with suppress(SystemExit):
            command("run", str(self.folder / "recipe.yaml"))
        (self.folder / "counts.json").write_text(json.dumps(counts))

    def go(self, prepare: Callable[[], None] = lambda: None, *words: str) -> tuple[int, str]:
        """The command in a child after `prepare`; its exit code and what it said."""

        def work() -> None:
            prepare()
            command(*(words or ("run",)), str(self.folder / "recipe.yaml"))

        code = fork(work, self.log)
        return code, self.log.read_text("utf-8", "replace")

    def reset(self, state: Path) -> None:
        """Put the run folder into an earlier state."""
        shutil.rmtree(self.run, ignore_errors=True)
        if state.exists():
            shutil.copytree(state, self.run)

    def judge(self, found: dict[str, Any], done: dict[str, int] | None = None) -> dict[str, Any]:
        """Run again undisturbed, and compare with the run that nobody disturbed."""
        code, said = self.go()
        made, later = contents(self.run), finished(self.run)
        differing = sorted(n for n in self.expected.keys() | made.keys() if made.get(n) != self.expected.get(n))
        again = sorted(name for name, at in (done or {}).items() if later.get(name) != at)
        found |= {"code": code, "differing": [n for n in differing if n not in found.get("apart", ())], "again": again}
        found["lost"] = 0 if UNREAD in found.get("apart", ()) else rows_lost(self.run)
        found["survived"] = code == 0 and not found["differing"] and not again and not found["lost"] and not found.get("wrong")
        if not found["survived"]:
            found["said"] = said[-2000:]
        return found
