"""What keeping tokens saves: rows encoded anew, encoded and kept, and read again.

    python eval/performance/tokens.py --model DIR --pool FILE [--rows 8000] [--repeats 5] [--out FILE]

Seconds of the processor, interleaved in one process; ratios are to encoding anew, medians with their range. A thousand
rows a call, as preparing a pool does.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from llmselect import load_pool
from llmselect.engine.backbone import Backbone


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--pool", required=True)
    parser.add_argument("--rows", type=int, default=8000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    pool = load_pool(a.pool, limit=a.rows)
    times: dict[str, list[float]] = {"encoded and kept": [], "read again": []}
    size, tokens = 0, 0
    for _ in range(a.repeats):
        with tempfile.TemporaryDirectory() as scratch:
            tokens, anew = encoded(pool, Backbone(a.model, max_length=a.max_length))
            for seconds in times.values():
                seconds.append(encoded(pool, Backbone(a.model, max_length=a.max_length, tokens=Path(scratch)))[1] / anew)
            size = sum(file.stat().st_size for file in Path(scratch).rglob("*.safetensors"))
    ratios = {name: {"median": round(statistics.median(r), 3), "min": round(min(r), 3), "max": round(max(r), 3)}
              for name, r in times.items()}  # fmt: skip
    found = {"rows": len(pool), "tokens": tokens, "bytes_per_token": round(size / tokens, 2), "repeats": a.repeats,
             "ratio_to_encoding": ratios}  # fmt: skip
    print(json.dumps(found, indent=2))
    if a.out:
        a.out.write_text(json.dumps(found, indent=2) + "\n")


def encoded(pool: Any, backbone: Backbone) -> tuple[int, float]:
    """Tokens of the pool, and the seconds that they took."""
    start, count = time.process_time(), 0
    for first in range(0, len(pool), 1000):
        count += sum(len(row.ids) for row in backbone.encoder.encode(pool[first : first + 1000]["messages"]))
    return count, time.process_time() - start


if __name__ == "__main__":
    main()
