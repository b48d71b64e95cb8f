"""How many times faster do two processes extract than one?

    python eval/performance/processes.py [--processes 2] [--repeats 3] [--rows 2048] [--out FILE]

A model of width 256 and four blocks with random weights on the CPU, one thread a process, synthetic chats, RDS+ and TRIM. The
speed of a run is rows over the time between the first and the last shard of each process, so that starting Python does not
count, and the runs take turns: each ratio is of two neighbours. `floor` is the same ratio of plain forward passes of that
model that know nothing of one another: what caches and memory of the machine leave. Needs as many cores as processes, and a
machine without other work.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from memory import write

import launches
import tiny
from llmselect import atomic

SHARD_ROWS = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plain", type=Path, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.plain:
        print(plain_speed(a.plain))
        return
    runs, floors = list[list[float]](), list[list[float]]()
    with tempfile.TemporaryDirectory() as scratch:
        recipe = write_recipe(Path(scratch), a.rows)
        for i in range(a.repeats):
            runs.append([speed(recipe, Path(scratch) / f"{i}-{n}", n) for n in (1, a.processes)])
            floors.append([plain(Path(scratch) / "model", n) for n in (1, a.processes)])
    found = {"processes": a.processes, "extract": told(runs), "floor": told(floors)}
    print(json.dumps(found))
    if a.out:
        atomic.write_json(a.out, found)


def told(pairs: list[list[float]]) -> dict[str, object]:
    """Rows a second of one and of several processes, and their ratios."""
    ratios = sorted(several / one for one, several in pairs)
    return {"rows_per_second": [[round(s, 2) for s in pair] for pair in pairs],
            "ratio": round(statistics.median(ratios), 3), "range": [round(ratios[0], 3), round(ratios[-1], 3)]}  # fmt: skip


def write_recipe(folder: Path, rows: int) -> Path:
    """A pool of chats and a model that is wide enough for its products to be the work."""
    from transformers import LlamaConfig, LlamaForCausalLM

    words = tiny.tokenizer()
    shape = LlamaConfig(vocab_size=len(words), hidden_size=256, intermediate_size=1024, num_hidden_layers=4,
                        num_attention_heads=4, bos_token_id=0, pad_token_id=1, eos_token_id=3)  # fmt: skip
    LlamaForCausalLM(shape).save_pretrained(folder / "model")
    words.save_pretrained(folder / "model")
    plan = {"name": "processes", "model": {"path": str(folder / "model")}, "pool": {"path": write(folder / "pool.jsonl", rows)},
            "targets": {"t": {"dev": write(folder / "dev.jsonl", 16)}}, "shard_rows": SHARD_ROWS,
            "features": {"rds": {"extractor": "embedding"}, "trim": {"extractor": "trim"}},
            "methods": {"random": {"selector": "random"}}}  # fmt: skip
    (folder / "recipe.yaml").write_text(json.dumps(plan))
    return folder / "recipe.yaml"


def speed(recipe: Path, out: Path, processes: int) -> float:
    """Rows a second of one run, the first shard of each process and what came before it left out."""
    subprocess.run(launches.launched(recipe, out, "extract", processes), check=True, env=alone(), stderr=subprocess.DEVNULL)
    ends = sorted(file.stat().st_mtime for file in (out / "features" / "trim").glob("0*.json"))
    return (len(ends) - processes) * SHARD_ROWS / (ends[-1] - ends[processes - 1])


def plain(model: Path, processes: int) -> float:
    """Rows a second of plain forward passes in so many processes at once."""
    command = [sys.executable, __file__, "--plain", str(model)]
    children = [subprocess.Popen(command, env=alone(), stdout=subprocess.PIPE, text=True) for _ in range(processes)]
    return sum(float(child.communicate()[0]) for child in children)


def plain_speed(model: Path, seconds: float = 10.0) -> float:
    """Of this process; it goes on a while before and after, so that the others are not measured alone."""
    import torch
    from transformers import AutoModelForCausalLM

    body, rows = AutoModelForCausalLM.from_pretrained(model).eval(), torch.randint(10, 90, (SHARD_ROWS, 64))
    begin, done, end = time.monotonic() + 2, 0, time.monotonic() + 4 + seconds
    with torch.inference_mode():
        while (now := time.monotonic()) < end:
            body(input_ids=rows, use_cache=False)
            done += SHARD_ROWS if begin <= now < begin + seconds else 0
    return done / seconds


def alone() -> dict[str, str]:
    """One thread, no accelerator."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(Path(__file__).parents[2])}


if __name__ == "__main__":
    main()
