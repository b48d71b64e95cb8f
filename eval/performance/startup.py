"""How long `llmselect --help` takes beside a Python that does nothing: medians, and their ratio.

    python eval/performance/startup.py [--repeats 10]

The two commands take turns, after one of each that warms the caches.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from statistics import median

COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "llmselect --help": ["-m", "llmselect", "--help"],
    "llmselect show trim": ["-m", "llmselect", "show", "trim"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=10)
    a = parser.parse_args()
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for turn in range(a.repeats + 1):
        for name, arguments in COMMANDS.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
            if turn:
                seconds[name].append(time.perf_counter() - start)
    floor = median(seconds["python -c pass"])
    for name, taken in seconds.items():
        middle = median(taken)
        print(json.dumps({"command": name, "median_s": round(middle, 3), "min_s": round(min(taken), 3),
                          "max_s": round(max(taken), 3), "times_python": round(middle / floor, 1)}))  # fmt: skip


if __name__ == "__main__":
    main()
