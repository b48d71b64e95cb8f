"""Two quick measurements of a machine: how fast its devices multiply matrices, how fast its disk takes what is synced."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

WRITTEN, SMALL_FILES = 16_000_000, 8


def devices() -> list[dict[str, Any]]:
    """Every device that torch can use: `{kind, name, memory, memory_free, bfloat16, dtype, gflops}`; the CPU is the last.

    `gflops`: 10⁹ multiplications and additions per second of a square matrix product, in the type that passes take there.
    """
    import torch

    found: list[dict[str, Any]] = []
    for i in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(i)
        half = torch.cuda.get_device_capability(i) >= (8, 0)
        found.append({"kind": "cuda", "name": torch.cuda.get_device_name(i), "memory": total, "memory_free": free,
                      "bfloat16": half, **product(f"cuda:{i}", "bfloat16" if half else "float32", 4096)})  # fmt: skip
    if torch.backends.mps.is_available():
        memory = torch.mps.recommended_max_memory()
        found.append({"kind": "mps", "name": "Apple GPU", "memory": memory, "memory_free": None, "bfloat16": True,
                      **product("mps", "float32", 2048)})  # fmt: skip
    found.append({"kind": "cpu", "name": "CPU", "memory": None, "memory_free": None, "bfloat16": None,
                  **product("cpu", "float32", 1024)})  # fmt: skip
    return found


def product(device: str, dtype: str, n: int, repeats: int = 5) -> dict[str, Any]:
    """The best of `repeats` products of two n × n matrices: 2n³ operations over its seconds, in 10⁹ per second."""
    import torch

    a = torch.ones(n, n, device=device, dtype=getattr(torch, dtype))
    wait = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(device.partition(":")[0], lambda: None)
    best = float("inf")
    for _ in range(repeats + 1):  # the first also loads the kernels; it is never the best where that costs anything
        wait()
        start = time.perf_counter()
        torch.matmul(a, a)
        wait()
        best = min(best, time.perf_counter() - start)
    return {"dtype": dtype, "gflops": 2 * n**3 / best / 1e9}


def write(folder: Path) -> dict[str, Any]:
    """`mb_per_s` of one synced file of 16 MB, `small_ms` for a small one (shards are synced before they count), `error`."""
    data = np.random.default_rng(0).bytes(WRITTEN)  # a compressing disk must not win by zeros
    try:
        with tempfile.TemporaryDirectory(prefix=".llmselect-doctor-", dir=folder) as place:
            start = time.perf_counter()
            _synced(Path(place, "large"), data)
            middle = time.perf_counter()
            for i in range(SMALL_FILES):
                _synced(Path(place, f"small{i}"), data[:1000])
            end = time.perf_counter()
    except OSError as error:
        return {"mb_per_s": None, "small_ms": None, "error": error.strerror or type(error).__name__}
    return {"mb_per_s": WRITTEN / 1e6 / (middle - start), "small_ms": 1000 * (end - middle) / SMALL_FILES, "error": None}


def _synced(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
