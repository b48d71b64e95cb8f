"""The selections of a run, read one after the other: what is kept of each is as long as the selection, not as the pool."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from llmselect.compare import spearman
from llmselect.errors import UsageError
from llmselect.selection import Selection
from llmselect.stages import TOKENS, Run

REJECTS = 25  # best-scored rows not selected, per selection
BINS = 40
LENGTHS = np.unique(np.round(2 ** np.arange(0, 22.5, 0.5)).astype(np.int64))  # edges of token counts: 1, 2, 3, 4, 6, 8, 11, …


@dataclass
class View:
    """One selection on the page: its rows, the best of those it left, and its distributions."""

    name: str
    method: str
    seeds: list[int]
    selection: Selection
    score: np.ndarray | None  # of the selected rows
    rejects: np.ndarray
    reject_score: np.ndarray
    figures: dict[str, Any] = field(default_factory=dict[str, Any])


def read_views(run: Run) -> list[View]:
    """Every selection of the run, in the recipe's order; those of several seeds that are alike are one.

    Errors: `UsageError` when the run has selected nothing yet; `LlmselectError` naming a damaged selection.
    """
    views: dict[tuple[str, bytes], View] = {}
    cost = run.store[f"{TOKENS}.supervised"]
    for file in selection_files(run):
        selection = Selection.load(file.parent)
        method, seed = file.parent.parent.name, int(file.parent.name.removeprefix("seed-"))
        key = (method, selection.indices.tobytes())
        if key not in views:
            views[key] = view_of(method, selection, cost)
        views[key].seeds.append(seed)
    several = {method for method, _ in views if sum(method == other for other, _ in views) > 1}
    for view in views.values():
        if view.method in several:
            view.name = f"{view.method}, seed {', '.join(map(str, view.seeds))}"
    return list(views.values())


def selection_files(run: Run) -> list[Path]:
    """`selection.json` of every method and seed. Errors: `UsageError` when there is none."""
    place = {method: i for i, method in enumerate(run.recipe.methods)}
    files = [f for f in (run.folder / "selections").glob("*/seed-*/selection.json") if f.parent.name[5:].isdigit()]
    if not files:
        raise UsageError(f"{run.folder} has no selections to report on; type: llmselect select {run.folder / 'config.yaml'}")

    def order(file: Path) -> tuple[int, str, int]:
        method, seed = file.parent.parent.name, file.parent.name
        return place.get(method, len(place)), method, int(seed[5:])

    return sorted(files, key=order)


def view_of(method: str, selection: Selection, cost: Any) -> View:
    """A selection without its pool-long scores, which have given their histogram and the best rejects."""
    figures: dict[str, Any] = {}
    score, rejects, reject_score = None, np.zeros(0, np.int64), np.zeros(0)
    tokens = cost[selection.indices]
    figures["tokens"] = int(tokens.sum())
    figures["lengths"] = np.histogram(tokens, LENGTHS)[0].tolist()
    if selection.scores is not None:
        down = selection.provenance.get("config", {}).get("order") == "asc"  # this method takes the smallest first
        merged = best_of_groups(selection.scores, down)
        score = merged[selection.indices]
        figures["scores"] = score_histogram(merged, selection.indices)
        rejects = best_rejects(-merged if down else merged, selection.indices)
        reject_score = merged[rejects]
        known = np.isfinite(score)
        figures["score_length"] = spearman(score[known], tokens[known]) if known.sum() > 1 else None
    return View(method, method, [], replace(selection, scores=None), score, rejects, reject_score, figures)


def best_of_groups(scores: np.ndarray, down: bool = False) -> np.ndarray:
    """`[n]` of `[n]` or `[n, G]`: the score of the best group, the smallest where methods go `down`."""
    if scores.ndim == 1:
        return scores.astype(np.float64)
    return (scores.min(1) if down else scores.max(1)).astype(np.float64)


def score_histogram(scores: np.ndarray, chosen: np.ndarray) -> dict[str, Any] | None:
    """Counts of pool and selection in the same bins; the outermost 0.1 % on either side fall into the end bins."""
    finite = scores[np.isfinite(scores)]
    if not len(finite):
        return None
    low, high = (float(q) for q in np.quantile(finite, [0.001, 0.999]))
    if low == high:
        low, high = low - 0.5, high + 0.5

    def count(part: np.ndarray) -> list[int]:
        return np.histogram(np.clip(part, low, high), BINS, (low, high))[0].tolist()

    mine = scores[chosen]
    return {"low": low, "high": high, "pool": count(finite), "selected": count(mine[np.isfinite(mine)])}


def best_rejects(scores: np.ndarray, chosen: np.ndarray, count: int = REJECTS) -> np.ndarray:
    """The rows of highest score that were not selected, best first; rows without a score are none of them."""
    left = np.where(np.isfinite(scores), scores, -np.inf)
    left[chosen] = -np.inf
    best = np.argpartition(-left, min(count, len(left) - 1))[:count]
    best = best[np.lexsort((best, -left[best]))]
    return best[np.isfinite(left[best])]


def overlap(views: list[View]) -> list[list[float]]:
    """Jaccard overlap of every two selections."""
    return [[round(a.selection.overlap(b.selection), 4) for b in views] for a in views]


def rows_shown(views: list[View], n: int, sample: int) -> tuple[np.ndarray, np.ndarray]:
    """Pool rows on the page, ascending, at most `sample`, and those of them that are told in full.

    Half for the selections: their best rejects, then their rows in turns by rank. The rest is drawn from the pool.
    """
    from llmselect.kernels.groups import round_robin

    if n <= sample:
        full = np.unique(np.concatenate([np.concatenate([v.selection.indices, v.rejects]) for v in views]))
        return np.arange(n), full
    most = max(1, sample // (4 * len(views)))  # rejects take a quarter of the page at most
    left = np.unique(np.concatenate([v.rejects[: min(REJECTS, most)] for v in views]))
    taken, _ = round_robin([v.selection.indices for v in views], max(len(views), sample // 2 - len(left)), n)
    full = np.union1d(left, taken)[:sample]
    drawn = np.random.default_rng(0).choice(n, sample, replace=False)
    rest = drawn[~np.isin(drawn, full)][: sample - len(full)]
    return np.union1d(full, rest), full
