"""Do processes, batches, shards and threads change a feature or a selection? One recipe with every registered selector.

    python eval/performance/launch.py [--rows 160] [--out eval/results/performance/launch.md]

A tiny model on the CPU; five features; the first run is one process with one thread, 600 padded tokens a batch and 20 rows a
shard. Every other run changes what its row says, and is compared with it: arrays by the largest difference as a share of their
largest value, selections by their rows in order.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
import launches
import tiny
from llmselect.registry import selectors

RUNS: dict[str, dict[str, int]] = {
    "2 processes": {"processes": 2}, "3 processes": {"processes": 3}, "4 processes": {"processes": 4},
    "150 tokens a batch": {"batch_tokens": 150}, "4,096 tokens, 64 rows a shard": {"batch_tokens": 4096, "shard_rows": 64},
    "2 threads": {"threads": 2}, "4 threads": {"threads": 4}}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=160)
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    head = ["run", "float16 features", "float32 features", "int8 features", "selections that differ"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        recipe = launches.write_recipe(folder, tiny.save(folder / "model"), a.rows)
        one = launches.run(recipe, folder / "one")
        for i, (name, changed) in enumerate(RUNS.items()):
            other = launches.run(recipe, folder / f"other{i}", **changed)
            worst = {kind: 0.0 for kind in ("float16", "float32", "int8")}
            for kind, share in launches.feature_differences(one, other).values():
                worst[kind] = max(worst.get(kind, 0.0), share)
            differing = launches.selection_differences(one, other)
            shares = [f"{worst[kind]:.1e}" if worst[kind] else "same bytes" for kind in ("float16", "float32", "int8")]
            lines.append(f"| {name} | {' | '.join(shares)} | {', '.join(differing) or f'none of {len(selectors.names())}'} |")
            print(lines[-1], flush=True)
            if a.out:
                head = f"# Launches\n\n```bash\npython eval/performance/launch.py --rows {a.rows}\n```\n\n"
                a.out.write_text(head + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
