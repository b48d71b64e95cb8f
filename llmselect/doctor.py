"""Is this machine ready? Versions, extras, devices, disks, settings, two quick measurements, and what to do about them.

Nothing secret is read further than to tell whether it is there: of a token, set or not; of an address, its host.
"""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import sys
import tomllib
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from llmselect import speed
from llmselect.errors import UsageError

# What an extra is for. Which there are and what they bring, the package's own metadata tells.
EXTRAS = {
    "train": "fine-tuning on selections, warm-ups, schedules inside TRL's trainer",
    "eval": "llmselect lm-eval",
    "sae": "training sparse autoencoders, and reading published ones, for mona",
    "cluster": "clusters by faiss: kmq, quad, tagcos, dedup, groups",
    "ot": "optimal transport: tarot, tarot_auto",
    "vllm": "llmselect generate --backend vllm",
    "report": "figures: selection.plot, pictures on Hub cards",
    "notebook": "the notebooks of recipes/notebooks, progress bars in notebooks",
    "dev": "tests and linters",
}
NATIVE = ("numpy", "torch", "pyarrow", "numba")  # packages whose binary part may fail on a machine though pip put it there
GB = 1e9


def diagnose(runs: Path | str = "runs") -> dict[str, Any]:
    """Everything `llmselect doctor` tells, as plain values; sizes in bytes.

    `advice` is a list of `{level, text}`; a level of `error` means that something required is broken, and `ok` is false then.
    `runs`: the folder that runs go to, there already or not. Writes 16 MB and some small files there and deletes them.
    """
    if Path(runs).exists() and not Path(runs).is_dir():
        raise UsageError(f"runs: {runs} is a file; give the folder that runs go to")
    required, extras = packages(requirements())
    broken = [failure for name in NATIVE if (failure := import_failure(name))]
    found: dict[str, Any] = {
        "llmselect": importlib.import_module("llmselect").__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "packages": required,
        "broken_imports": broken,
        "extras": extras,
        "devices": [] if any(one.startswith("torch:") for one in broken) else speed.devices(),
        "cpu": cpu(),
        "disks": disks(Path(runs)),
        "settings": settings(),
    }
    found["write"] = speed.write(Path(found["disks"]["runs"]["measured_at"]))
    found["advice"] = advice(found)
    found["ok"] = all(one["level"] != "error" for one in found["advice"])
    return found


def requirements() -> list[str]:
    """The requirements of llmselect as its metadata states them; in a source tree that is not installed, pyproject.toml's."""
    try:
        return metadata.requires("llmselect") or []
    except metadata.PackageNotFoundError:
        project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8"))["project"]
        optional = project["optional-dependencies"].items()
        return project["dependencies"] + [f'{one}; extra == "{extra}"' for extra, many in optional for one in many]


def packages(stated: Iterable[str]) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]:
    """The required packages, and those of each extra: `{name, needs, version, ok}`, version None where there is none."""
    from packaging.requirements import Requirement

    required: list[dict[str, Any]] = []
    extras: dict[str, dict[str, Any]] = {}
    for requirement in map(Requirement, stated):
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            version = None
        fits = version is not None and requirement.specifier.contains(version, prereleases=True)
        one = {"name": requirement.name, "needs": str(requirement.specifier), "version": version, "ok": fits}
        if requirement.marker is None:
            required.append(one)
            continue
        for extra in EXTRAS:
            if requirement.marker.evaluate({"extra": extra}):
                home = extras.setdefault(extra, {"for": EXTRAS[extra], "installed": True, "packages": []})
                home["packages"].append(one)
                home["installed"] &= fits
    return required, extras


def import_failure(name: str) -> str | None:
    """Why a package cannot be imported, in one line; None if it can."""
    try:
        importlib.import_module(name)
    except Exception as error:  # a broken binary may raise anything
        return f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return None


def cpu() -> dict[str, Any]:
    """Cores this process may use, threads that torch takes, memory; a container's limits where they are lower."""
    import psutil

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = psutil.virtual_memory()
    quota, _, period = _control_group("cpu.max").partition(" ")
    limit = _control_group("memory.max")
    return {
        "cores": min(cores, max(1, round(int(quota) / int(period)))) if quota.isdigit() else cores,
        "threads": sys.modules["torch"].get_num_threads() if "torch" in sys.modules else None,
        "memory": min(memory.total, int(limit)) if limit.isdigit() else memory.total,
        "memory_free": memory.available,
    }


def _control_group(name: str) -> str:
    try:
        return Path("/sys/fs/cgroup", name).read_text("ascii").strip()
    except OSError:
        return ""


def disks(runs: Path) -> dict[str, dict[str, Any]]:
    """Where runs and the caches of the Hugging Face libraries lie: size of what is there, room on the disk."""
    from huggingface_hub import constants

    data = Path(os.environ.get("HF_DATASETS_CACHE", Path(constants.HF_HOME) / "datasets"))
    found = dict[str, dict[str, Any]]()
    for name, folder in (("runs", runs), ("hub_cache", Path(constants.HF_HUB_CACHE)), ("datasets_cache", data)):
        there = folder.expanduser().absolute()
        while not there.is_dir():
            there = there.parent
        usage = shutil.disk_usage(there)
        size = folder_bytes(folder) if folder.is_dir() else 0
        found[name] = {"path": str(folder), "measured_at": str(there), "bytes": size, "free": usage.free, "total": usage.total}
    return found


def folder_bytes(folder: Path) -> int:
    """Bytes of the files below a folder; what links lead to is counted where it lies, files that vanish are not."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(place, name)).st_size  # noqa: PTH118 - a cache has a great many files
            except OSError:
                continue
    return total


def settings() -> dict[str, Any]:
    """What the environment tells the Hugging Face libraries and torch. No token, no password of an address."""
    from huggingface_hub import constants, get_token

    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
    return {
        "offline": bool(constants.HF_HUB_OFFLINE),
        "hub": urlsplit(constants.ENDPOINT).hostname,
        "token": get_token() is not None,
        "environment": {name: os.environ[name] for name in names if name in os.environ},
    }


def advice(found: dict[str, Any]) -> list[dict[str, str]]:
    """What to do, the worst first: `error` something required is broken, `warning` it will hurt, `note` good to know."""
    told = [("error", f"{one} does not import; install it again") for one in found["broken_imports"]]
    for one in found["packages"]:
        if not one["ok"]:
            state = f"is {one['version']}" if one["version"] else "is not installed"
            told.append(("error", f"{one['name']} {state}; type: pip install '{one['name']}{one['needs']}'"))
    if found["write"]["error"]:
        told.append(("error", f"runs cannot be written: {found['write']['error']}; give another folder by out= in the recipe"))
    told += _machine_advice(found)
    unknown = [name for name, extra in found["extras"].items() if not extra["installed"]]
    if missing := [name for name in unknown if name not in ("dev", "vllm")]:
        told.append(("note", f"more methods and commands: pip install 'llmselect[{','.join(missing)}]'"))
    if found["settings"]["offline"]:
        told.append(("note", "offline: Hub ids fail unless they are in the cache; unset HF_HUB_OFFLINE to download"))
    elif not found["settings"]["token"]:
        told.append(("note", "no Hub token: `llmselect push` and gated models need one; type: hf auth login"))
    return [{"level": level, "text": text} for level, text in told]


def _machine_advice(found: dict[str, Any]) -> list[tuple[str, str]]:
    told: list[tuple[str, str]] = []
    machine, disk, written = found["cpu"], found["disks"], found["write"]
    for name, about in disk.items():
        if about["free"] < 5 * GB:
            told.append(("warning", f"{about['free'] / GB:.1f} GB free where {name.replace('_', ' ')} lies; features and "
                                    "checkpoints of one run may take more"))  # fmt: skip
    if machine["memory"] < 4 * GB:
        told.append(("warning", f"{machine['memory'] / GB:.1f} GB of memory: a model of 1 B parameters in float32 takes 4 GB"))
    if machine["threads"] and machine["threads"] > machine["cores"]:
        told.append(("warning", f"torch takes {machine['threads']} threads on {machine['cores']} cores; "
                                f"set OMP_NUM_THREADS={machine['cores']}"))  # fmt: skip
    elif machine["threads"] and machine["threads"] < machine["cores"] and "OMP_NUM_THREADS" in found["settings"]["environment"]:
        told.append(("note", f"torch takes {machine['threads']} of {machine['cores']} cores, as OMP_NUM_THREADS says"))
    if not written["error"] and written["mb_per_s"] < 50:
        told.append(("warning", f"runs are written at {written['mb_per_s']:.0f} MB/s: a slow or distant disk; "
                                "give out= on a local one"))  # fmt: skip
    kinds = {one["kind"] for one in found["devices"]}
    if kinds == {"cpu"}:
        told.append(("note", "no GPU: fine for small models and pools; --dry-run tells the minutes to expect"))
    for one in found["devices"]:
        if one["kind"] == "cuda" and not one["bfloat16"]:
            told.append(("warning", f"{one['name']} has no bfloat16; set dtype: float32 for the recipe's model"))
    return told
