"""Figures of a selection with matplotlib (extra `report`): `selection.plot.sources(pool)`, `.lengths(cost)`, `.scores()`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from llmselect.errors import UsageError, require

if TYPE_CHECKING:
    from llmselect.selection import Selection

BINS, SOURCES = 40, 20


@dataclass(frozen=True)
class Plots:
    """The figures of one selection. Each draws on `ax`, or on a figure of its own, and returns the matplotlib `Axes`.

    Errors: `MissingExtra` without matplotlib; `UsageError` for data of another pool.
    """

    selection: Selection

    def sources(self, pool: Any, ax: Any = None) -> Any:
        """Shares of the sources before and after. `pool`: the pool selected from, or `[n]` names of sources."""
        column = pool["source"] if hasattr(pool, "column_names") else pool
        names = self._of_pool("pool", list(column))
        before, after = Counter(map(str, names)), Counter(str(names[i]) for i in self.selection.indices.tolist())
        top = [name for name, _ in before.most_common(SOURCES)]
        ax, place = _axes(ax), np.arange(len(top))
        for shift, counts, label in ((-0.2, before, "pool"), (0.2, after, "selected")):
            total = max(1, sum(counts.values()))
            ax.barh(place + shift, [counts[name] / total for name in top], 0.4, label=label)
        # A name may hold what matplotlib reads as a formula; escaped, it is drawn as it is.
        ax.set_yticks(place, [name.replace("$", r"\$") for name in top])
        ax.invert_yaxis()
        ax.set_xlabel("share of rows")
        ax.legend()
        return ax

    def lengths(self, cost: Any, ax: Any = None) -> Any:
        """Distributions of length before and after. `cost [n]`: tokens per row, e.g. `store["tokens.supervised"]`."""
        tokens = np.asarray(self._of_pool("cost", cost), np.float64)
        return self._histogram(np.log2(np.maximum(tokens, 1)), "log2 of tokens per row", ax)

    def scores(self, ax: Any = None) -> Any:
        """Distributions of scores before and after; the best target group's where there are several.

        Errors: `UsageError` when the method scores no rows.
        """
        if self.selection.scores is None:
            raise UsageError(f"'{self.selection.provenance.get('selector', 'this selection')}' has no scores to plot; "
                             "methods that rank rows have, e.g. topk, similarity, mona")  # fmt: skip
        scores = np.asarray(self.selection.scores, np.float64)
        return self._histogram(scores if scores.ndim == 1 else scores.max(1), "score", ax)

    def _histogram(self, values: np.ndarray, label: str, ax: Any) -> Any:
        known, mine = values[np.isfinite(values)], values[self.selection.indices]
        ax, edges = _axes(ax), np.histogram_bin_edges(known, BINS)
        for part, name in ((known, "pool"), (mine[np.isfinite(mine)], "selected")):
            ax.hist(part, edges, weights=np.full(len(part), 1 / max(1, len(part))), alpha=0.6, label=name)
        ax.set_xlabel(label)
        ax.set_ylabel("share of rows")
        ax.legend()
        return ax

    def _of_pool(self, name: str, values: Any) -> Any:
        if len(values) != self.selection.n:
            raise UsageError(f"{name}: {len(values)} rows given; this selection is from a pool of {self.selection.n}")
        return values


def overlap(selections: Mapping[str, Selection], ax: Any = None) -> Any:
    """Jaccard overlap of every two selections, as a matrix of numbers on shades; returns the `Axes`.

    Errors: `MissingExtra` without matplotlib; `UsageError` for selections from different pools.
    """
    names = list(selections)
    shared = np.array([[selections[a].overlap(selections[b]) for b in names] for a in names]).reshape(len(names), -1)
    ax = _axes(ax)
    ax.imshow(shared, cmap="Blues", vmin=0, vmax=1)
    for i, j in np.ndindex(shared.shape):
        ax.text(j, i, f"{shared[i, j]:.2f}", ha="center", va="center", color="white" if shared[i, j] > 0.6 else "black")
    plain = [name.replace("$", r"\$") for name in names]
    ax.set_xticks(range(len(names)), plain, rotation=45, ha="right")
    ax.set_yticks(range(len(names)), plain)
    ax.set_title("overlap (Jaccard)")
    return ax


def _axes(ax: Any) -> Any:
    if ax is not None:
        return ax
    require("matplotlib", "report")
    from matplotlib import pyplot

    return pyplot.subplots(layout="constrained")[1]
