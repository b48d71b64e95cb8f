"""Progress of a pass: share of the work done and an ETA that counts tokens, not rows."""

from __future__ import annotations

import logging
import sys
import time

log = logging.getLogger("llmselect")


class Progress:
    """Counts work in tokens squared-out by length: rows differ by 100 × in cost, so a row count would lie.

    The unit is characters of the rows (known before any token is made); resumed work counts as done but not as speed.
    On a terminal or in a notebook it is a bar; elsewhere a log line at most every `every` seconds.
    """

    def __init__(self, label: str, total: int, done: int = 0, every: float = 30.0, show: bool = True,
                 unit: str = "char"):  # fmt: skip
        self.label, self.total, self.done, self.every, self.show = label, max(total, 1), done, every, show
        self.fresh, self.rows, self.start = 0, 0, time.monotonic()
        self.last = self.start
        self.bar = None
        if show and (sys.stderr.isatty() or "ipykernel" in sys.modules):
            from tqdm.auto import tqdm

            self.bar = tqdm(total=self.total, initial=done, desc=label, unit=unit, unit_scale=True, leave=False)

    def step(self, work: int, rows: int) -> None:
        """Add finished work (in the unit) and rows."""
        self.done, self.fresh, self.rows = self.done + work, self.fresh + work, self.rows + rows
        if self.bar is not None:
            self.bar.update(work)
        elif self.show and time.monotonic() - self.last >= self.every:
            self.last = time.monotonic()
            log.info("%s: %.0f %% · %s left", self.label, 100 * self.done / self.total, duration(self.eta()))

    def eta(self) -> float:
        """Seconds left at the speed of this launch (work found done before it does not flatter it)."""
        elapsed = time.monotonic() - self.start
        return (self.total - self.done) * elapsed / self.fresh if self.fresh else float("inf")

    def close(self) -> float:
        """End the bar; returns the seconds since the start."""
        if self.bar is not None:
            self.bar.close()
        return time.monotonic() - self.start


def duration(seconds: float) -> str:
    """`42 s`, `3 min`, `1 h 05 min` for a person."""
    if seconds == float("inf"):
        return "unknown time"
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
