"""What the page of a run holds, as plain JSON: read in blocks, so that only rows on the page are held as text."""

from __future__ import annotations

# datasets has no types.
# pyright: reportUnknownVariableType=false
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from llmselect import atomic
from llmselect.compare import kl_reductions
from llmselect.errors import LlmselectError
from llmselect.recipe import looks_like_path
from llmselect.report.plane import Plane, feature_of
from llmselect.report.views import LENGTHS, View, overlap, read_views, rows_shown
from llmselect.report.why import Explainer, number
from llmselect.stages import TOKENS, Run

FULL, SHORT = 1200, 200  # characters of a row that is explained, and of one that is only on the map
TURNS = 12  # messages of a row that are shown
SOURCES = 24  # sources told apart; the others are one
MOST = 600  # points of a curve, pulls of a bandit, clusters
_CURVES = ("folds", "trace", "sizes", "budgets", "silhouettes")


def contents(run: Run, sample: int) -> dict[str, Any]:
    """Everything on the page. Errors: as of `llmselect.report.write_report`."""
    views = read_views(run)
    n = len(run.pool)
    if wrong := [view.name for view in views if view.selection.n != n]:
        raise LlmselectError(f"{run.folder}: {wrong[0]} was selected from {views[0].selection.n} rows, the pool has {n}")
    shown, full = rows_shown(views, n, sample)
    names, counts = source_counts(run)
    for view, nearer in zip(views, kl_reductions(run.store, [view.selection for view in views]), strict=True):
        view.figures["kl_reduction"] = None if nearer is None else number(nearer)
    return {
        "run": about(run, n, len(shown)),
        "sources": {"names": names, "pool": counts},
        "targets": targets(run),
        "rows": rows(run, shown, full, names),
        "map": plane(run, shown),
        "lengths": {"edges": LENGTHS.tolist(), "pool": length_counts(run)},
        "views": [view_data(run, view, shown, names) for view in views],
        "why": explained(run, views, shown),
        "overlap": overlap(views),
        "results": results(run.folder),
    }


def about(run: Run, n: int, shown: int) -> dict[str, Any]:
    """The head of the page. No path of this machine: the page is made to be passed on."""
    model = run.recipe.model.path
    return {"name": run.recipe.name, "model": Path(model).name if looks_like_path(model) else model, "rows": n, "shown": shown,
            "targets": len(run.target), "seeds": list(run.recipe.seeds)}  # fmt: skip


def source_counts(run: Run) -> tuple[list[str], list[int]]:
    """Names and pool counts of the largest sources; what is left is counted under an empty name at the end."""
    counted: Counter[str] = Counter()
    data = run.pool.select_columns(["source"])
    for start in range(0, len(data), 8192):
        part: dict[str, list[str]] = data[start : start + 8192]
        counted.update(part["source"])
    top = sorted(counted.items(), key=lambda one: (-one[1], one[0]))
    kept = top if len(top) <= SOURCES else top[: SOURCES - 1]
    rest = sum(count for _, count in top[len(kept) :])
    return [name for name, _ in kept] + [""] * bool(rest), [count for _, count in kept] + [rest] * bool(rest)


def codes(found: list[str], names: list[str]) -> list[int]:
    """The place of each source among `names`; the last for those without a name of their own."""
    place = {name: i for i, name in enumerate(names)}
    return [place.get(one, len(names) - 1) for one in found]


def targets(run: Run) -> list[dict[str, Any]]:
    """Group and text of every target row."""
    data: dict[str, Any] = run.target[:]
    return [{"group": group, "text": excerpt(chat, FULL)} for group, chat in zip(data["group"], data["messages"], strict=True)]


def rows(run: Run, shown: np.ndarray, full: np.ndarray, names: list[str]) -> dict[str, Any]:
    """The rows on the page, as columns."""
    out: dict[str, Any] = {"pool": shown.tolist(), "id": [], "source": [], "text": []}
    explained = np.isin(shown, full)
    for start in range(0, len(shown), 1000):
        at = slice(start, start + 1000)
        part: dict[str, Any] = run.pool[shown[at]]
        out["id"] += part["id"]
        out["source"] += codes(part["source"], names)
        long = explained[at]
        out["text"] += [excerpt(chat, FULL if is_long else SHORT) for chat, is_long in zip(part["messages"], long, strict=True)]
    out["tokens"] = run.store[f"{TOKENS}.supervised"][shown].tolist()
    return out


def excerpt(messages: list[dict[str, str]], most: int) -> list[list[Any]]:
    """`[role, text, characters left out]` of each message; what room there is, is shared between them."""
    out, kept = list[list[Any]](), messages[:TURNS]
    for i, message in enumerate(kept):
        text, room = message["content"], most // (len(kept) - i)
        out.append([message["role"], text[:room], max(0, len(text) - room)])
        most -= min(room, len(text))
    if len(messages) > len(kept):
        out.append(["", "", sum(len(message["content"]) for message in messages[TURNS:])])
    return out


def plane(run: Run, shown: np.ndarray) -> dict[str, Any] | None:
    """Places of the rows and targets on the page, and the nearest target of each row; None without a feature for it."""
    if (name := feature_of(run.store)) is None:
        return None
    x: Any = run.store[name]
    made = Plane(x)
    found: dict[str, Any] = {"feature": name, "share": number(made.share), "xy": places(made.project(x, shown))}
    if f"{name}@target" in run.store:
        target: Any = run.store[f"{name}@target"]
        found["targets"] = places(made.project(target, np.arange(len(target))))
        nearest, cosine = made.nearest(shown, target)
        found["near"], found["cosine"] = nearest.tolist(), [number(one) for one in cosine]
    return found


def places(xy: np.ndarray) -> list[list[float] | None]:
    """Rounded places; None for a row without one."""
    return [[round(float(x), 4), round(float(y), 4)] if np.isfinite(x) and np.isfinite(y) else None for x, y in xy]


def length_counts(run: Run) -> list[int]:
    """The pool's supervised tokens per row, in the bins of `LENGTHS`."""
    total = np.zeros(len(LENGTHS) - 1, np.int64)
    for _, block in run.store[f"{TOKENS}.supervised"].blocks():
        total += np.histogram(block, LENGTHS)[0]
    return total.tolist()


def view_data(run: Run, view: View, shown: np.ndarray, names: list[str]) -> dict[str, Any]:
    """A selection's rows on the page by rank, its figures, and what its method told."""
    selection = view.selection
    ranks, at = listed(selection.indices, shown)
    mix = Counter(codes(sources_of(run, selection.indices), names))
    left = np.isin(view.rejects, shown)
    told = selection.provenance
    return {
        "name": view.name, "method": view.method, "seeds": view.seeds, "selector": told.get("selector"),
        "config": told.get("config"), "budget": told.get("budget"), "rows": len(selection), "tokens": view.figures["tokens"],
        "ranks": ranks.tolist(), "at": at.tolist(),
        "score": None if view.score is None else [number(one) for one in view.score[ranks]],
        "weight": None if selection.weights is None else [number(one) for one in selection.weights[ranks]],
        "rejects": np.searchsorted(shown, view.rejects[left]).tolist(),
        "reject_score": [number(one) for one in view.reject_score[left]],
        "sources": [mix.get(i, 0) for i in range(len(names))],
        "scores": view.figures.get("scores"), "score_length": view.figures.get("score_length"),
        "kl_reduction": view.figures.get("kl_reduction"),
        "lengths": view.figures["lengths"], "report": method_report(told.get("report") or {}),
    }  # fmt: skip


def listed(indices: np.ndarray, shown: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ranks of the selected rows that are on the page, ascending, and their places among `shown`."""
    ranks = np.flatnonzero(np.isin(indices, shown))
    return ranks, np.searchsorted(shown, indices[ranks])


def sources_of(run: Run, indices: np.ndarray) -> list[str]:
    """The source of each row of a selection."""
    return [*run.pool.select_columns(["source"])[np.asarray(indices)]["source"]] if len(indices) else []


def explained(run: Run, views: list[View], shown: np.ndarray) -> list[dict[str, Any]]:
    """Per selection the entries of its rows on the page and of its best rejects."""
    explainer, found = Explainer(run), list[dict[str, Any]]()
    for view in views:
        ranks, _ = listed(view.selection.indices, shown)
        left = view.rejects[np.isin(view.rejects, shown)]
        found.append({"selected": explainer.of_selected(view, ranks, chats(run, view.selection.indices[ranks])),
                      "rejects": explainer.of_rejects(view, left, chats(run, left))})  # fmt: skip
    return found


def chats(run: Run, indices: np.ndarray) -> list[Any]:
    """The messages of some rows."""
    return [*run.pool.select_columns(["messages"])[np.asarray(indices)]["messages"]] if len(indices) else []


def method_report(report: dict[str, Any]) -> dict[str, Any]:
    """What a method told about its search: its curves, cut to a length that can be drawn, and its plain values."""
    plain = {name: value for name, value in report.items() if isinstance(value, int | float | str | bool)}
    out: dict[str, Any] = {name: value for name, value in plain.items() if name not in _CURVES}
    if "folds" in report:
        out["folds"] = [{"curve": one["curve"][:MOST], "best": one["best"]} for one in report["folds"]]
    if "trace" in report:
        out["pulls"], out["trace"] = len(report["trace"]), report["trace"][:MOST]
    if "sizes" in report:
        order = np.argsort(-np.asarray(report["sizes"]), kind="stable")[:MOST].tolist()
        out["sizes"] = [[i, report["sizes"][i], report.get("budgets", report["sizes"])[i]] for i in order]
    if "silhouettes" in report:
        out["silhouettes"] = {str(k): number(v) for k, v in report["silhouettes"].items()}
    return json.loads(json.dumps(out, default=str), parse_constant=lambda _: None)


def results(folder: Path) -> dict[str, Any] | None:
    """`results.json` of the run, if it was evaluated."""
    file = folder / "results.json"
    return atomic.read_json(file, "run the same recipe again") if file.exists() else None
