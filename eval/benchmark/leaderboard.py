"""Write `eval/benchmark/leaderboard.md` from the results in `eval/benchmark/cells`, or say whether it is stale.

    python eval/benchmark/leaderboard.py [--check]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from llmselect import atomic
from llmselect.benchmark.leaderboard import leaderboard

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when the file is stale")
    a = parser.parse_args()
    file, text = HERE / "leaderboard.md", leaderboard(HERE / "cells")
    if a.check:
        stale = not file.exists() or file.read_text("utf-8") != text
        sys.exit(f"{file} is stale; type: python eval/benchmark/leaderboard.py" if stale else 0)
    atomic.write_text(file, text)
    print(f"written: {file}")


if __name__ == "__main__":
    main()
