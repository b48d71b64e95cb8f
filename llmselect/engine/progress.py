"""Progress of a pass: share of the work done and an ETA that counts tokens, not rows."""

from __future__ import annotations

import logging
import sys
import time
from html import escape
from typing import Any

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
        if show and _in_a_notebook():
            self.bar = NotebookBar(self)
        elif show and sys.stderr.isatty():
            from tqdm import tqdm

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


def _in_a_notebook() -> bool:
    """Whether a kernel runs this process; that some library has imported one says nothing."""
    known = sys.modules.get("IPython")
    return known is not None and getattr(known.get_ipython(), "kernel", None) is not None


class NotebookBar:
    """One output of a notebook's cell that is written anew: a bar, and in the end a line that stays.

    A bar of text would leave hundreds of lines in a saved notebook, and one of ipywidgets, saved, stands at 0 % for ever.
    """

    def __init__(self, progress: Progress, every: float = 0.25):
        self.progress, self.every, self.drawn = progress, every, time.monotonic()
        self.handle = _display({"text/html": self.html(), "text/plain": progress.label})

    def update(self, work: int) -> None:
        """Draw what `progress` has come to, at most every `every` seconds."""
        if time.monotonic() - self.drawn >= self.every:
            self.drawn = time.monotonic()
            self._draw(self.html(), self.progress.label)

    def close(self) -> None:
        """Leave one line: what was done, in what time."""
        p = self.progress
        told = f"{p.label}: {p.rows:,} in {duration(time.monotonic() - p.start)}" if p.fresh else f"{p.label}: done before"
        self._draw(f"<small>{escape(told)}</small>", told)

    def html(self) -> str:
        """The bar as it stands."""
        p = self.progress
        share = min(1.0, p.done / p.total)
        left = f", {duration(p.eta())} left" if p.fresh else ""
        return (f"<small>{escape(p.label)}</small> <progress value='{share:.3f}' max='1'></progress> "
                f"<small>{share:.0%}{left}</small>")  # fmt: skip

    def _draw(self, html: str, plain: str) -> None:
        self.handle.update({"text/html": html, "text/plain": plain}, raw=True)


def _display(shown: dict[str, str]) -> Any:
    import IPython.display  # there wherever ipykernel runs

    shown_by: Any = IPython.display
    return shown_by.display(shown, raw=True, display_id=True)


def duration(seconds: float) -> str:
    """`42 s`, `3 min`, `1 h 05 min` for a person."""
    if seconds == float("inf"):
        return "unknown time"
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
