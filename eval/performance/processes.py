"""How many times faster do two processes extract than one?

    python eval/performance/processes.py [--processes 2] [--repeats 3] [--rows 512] [--out FILE]

A model of width 256 and four blocks with random weights on the CPU, one thread a process, synthetic chats, RDS+ and TRIM. The
speed of a run is rows over the time between the first and the last shard of each process, so that starting Python does not
count, and the runs take turns: each ratio is of two neighbours. Needs as many cores as processes, and a machine without other
work.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
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
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        recipe = write_recipe(Path(scratch), a.rows)
        speeds = [[speed(recipe, Path(scratch) / f"{i}-{n}", n) for n in (1, a.processes)] for i in range(a.repeats)]
    ratios = sorted(several / one for one, several in speeds)
    found = {"processes": a.processes, "rows_per_second": [[round(s, 2) for s in pair] for pair in speeds],
             "ratio": round(statistics.median(ratios), 3), "range": [round(ratios[0], 3), round(ratios[-1], 3)]}  # fmt: skip
    print(json.dumps(found))
    if a.out:
        atomic.write_json(a.out, found)


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
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run(launches.launched(recipe, out, "extract", processes), check=True, env=env, stderr=subprocess.DEVNULL)
    ends = sorted(file.stat().st_mtime for file in (out / "features" / "trim").glob("0*.json"))
    return (len(ends) - processes) * SHARD_ROWS / (ends[-1] - ends[processes - 1])


if __name__ == "__main__":
    main()
