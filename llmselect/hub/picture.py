"""A picture of the sources of a pool and of what was selected from it."""

from __future__ import annotations

# matplotlib has types in part.
# pyright: reportUnknownMemberType=false
import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

from llmselect.errors import MissingExtra, require

log = logging.getLogger("llmselect")


def source_mix(sources: Sequence[str], shares: Mapping[str, Sequence[float]], file: Path) -> bool:
    """Draw bars of each side's share per source to the PNG `file`; False, with a note, where matplotlib is missing.

    `shares`: per side (the pool first, then methods) a share in 0 … 1 for each of `sources`.
    """
    try:
        require("matplotlib", "report")
    except MissingExtra as missing:
        log.warning("the card has no picture of the source mix, only the table: %s", missing)
        return False
    # A figure of its own, without pyplot: no window system, and nothing of the user's settings changes.
    from matplotlib.figure import Figure

    width = 0.8 / len(shares)
    figure = Figure(figsize=(7, 1.2 + 0.22 * len(sources) * max(2, len(shares))), layout="constrained")
    axes = figure.subplots()
    for side, (name, values) in enumerate(shares.items()):
        places = [place + (side - (len(shares) - 1) / 2) * width for place in range(len(sources))]
        axes.barh(places, [100 * value for value in values], width, label=_shown(name))
    axes.set_yticks(range(len(sources)), [_shown(name) for name in sources])
    axes.invert_yaxis()
    axes.set_xlabel("% of the rows")
    legend = axes.legend()
    for text in (*axes.get_yticklabels(), *legend.get_texts()):
        text.set_parse_math(False)  # a $ in a name is no formula
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # letters that the font lacks become boxes
        figure.savefig(file, dpi=110, metadata={"Software": None})
    return True


def _shown(name: str) -> str:
    """A name on one line, without signs that cannot be drawn; matplotlib leaves labels that begin with `_` out."""
    plain = "".join(one if one.isprintable() else " " for one in name)
    plain = plain if len(plain) <= 40 else plain[:39] + "…"
    return f" {plain}" if plain.startswith("_") else plain
