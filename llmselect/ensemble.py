"""Several selections of one pool made one: ranks added up, or turns between them.

Papers: Borda 1781; reciprocal rank fusion, Cormack, Clarke, Büttcher, SIGIR 2009.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from llmselect.errors import UsageError, nearest
from llmselect.kernels.groups import round_robin
from llmselect.kernels.keyed import keys_of
from llmselect.kernels.topk import topk_stable
from llmselect.selection import Budget, Selection

log = logging.getLogger("llmselect")
How = Literal["borda", "rrf", "round_robin"]
FUSION = 60.0  # the constant of reciprocal rank fusion, as in its paper


def ensemble(selections: Mapping[str, Selection], how: How = "borda", budget: Any = None, *, cost: Any = None) -> Selection:
    """One selection of the rows that `selections`, of one pool, hold between them.

    With the rank r = 0, 1, … of a row in each selection that holds it: `borda` takes the rows of largest Σ (L - r), L the
    length of the longest selection; `rrf` of largest Σ 1 / (61 + r); `round_robin` lets the selections take turns in their
    order, each giving its best row not yet taken. Equal sums by row id. Evidence: `rank_<name>`, -1 where a selection lacks
    the row, and with round_robin the `turn`, whose it was.

    Args:
        budget: rows, `"5%"`, `{fraction: …}` or `{tokens: …}`; None takes as many rows as the longest selection has.
        cost: `[n]` supervised tokens, for a budget in tokens.

    Errors: `UsageError` for selections of different pools, and for a budget that they do not fill.
    """
    rows, ids, ranks = _ranks(selections)
    n = next(iter(selections.values())).n
    if how not in get_args(How):
        raise UsageError(f"how: {how!r}; one of {', '.join(get_args(How))}")
    longest = max(map(len, selections.values()))
    keys = keys_of(None, n)[rows] if ids is None else keys_of(ids, len(rows))
    turn, scores = None, None
    if how == "round_robin":
        lists = [np.searchsorted(rows, one.indices) for one in selections.values()]
        order, by = round_robin(lists, len(rows), len(rows))
        turn = np.array(list(selections))[by]
    else:
        points = longest - ranks if how == "borda" else 1.0 / (FUSION + 1 + ranks)
        sums = np.where(ranks >= 0, points, 0).sum(1, dtype=np.float64).astype(np.float32)
        order = topk_stable(sums, len(rows), keys)
        scores = np.full(n, np.nan, np.float32)
        scores[rows] = sums
    parsed = Budget.parse(longest if budget is None else budget)
    count = _count(parsed, rows[order], n, cost)
    order = order[:count]
    evidence = {f"rank_{name}": ranks[order, i] for i, name in enumerate(selections)}
    if turn is not None:
        evidence["turn"] = turn[:count]
    made = {"selector": "ensemble", "config": {"how": how}, "of": {k: dict(v.provenance) for k, v in selections.items()},
            "budget": parsed.plain(), "n": n}  # fmt: skip
    return Selection(rows[order], n, scores, None, evidence, True, made, None if ids is None else [ids[int(i)] for i in order])


def _ranks(selections: Mapping[str, Selection]) -> tuple[np.ndarray, list[str] | None, np.ndarray]:
    """The rows that any selection holds, ascending; their ids; the rank `[rows, selections]` of each, -1 for none."""
    if not selections:
        raise UsageError("an ensemble needs at least one selection")
    if len(sizes := {one.n for one in selections.values()}) > 1:
        raise UsageError(f"selections from pools of {' and '.join(map(str, sorted(sizes)))} rows are of different pools")
    rows = np.unique(np.concatenate([one.indices for one in selections.values()]))
    ranks, known = np.full((len(rows), len(selections)), -1, np.int64), dict[int, str]()
    for i, (name, one) in enumerate(selections.items()):
        ranks[np.searchsorted(rows, one.indices), i] = np.arange(len(one))
        for row, row_id in zip(one.indices.tolist(), one.ids or (), strict=False):
            if known.setdefault(row, row_id) != row_id:
                raise UsageError(f"'{name}': its row {row} has the id {row_id}, another selection's {known[row]}: other pools")
    complete = all(one.ids is not None for one in selections.values())
    return rows, [known[int(row)] for row in rows] if complete else None, ranks


def _count(budget: Budget, ranked: np.ndarray, n: int, cost: Any) -> int:
    if budget.tokens is None:
        if (count := budget.rows_of(n)) > len(ranked):
            raise UsageError(f"a budget of {count} rows is more than the {len(ranked)} rows that the selections hold")
        return count
    if cost is None:
        raise UsageError("a budget in tokens needs cost=, the supervised tokens of each row")
    total = np.cumsum(np.asarray(cost, np.int64)[ranked])
    if not (count := int(np.searchsorted(total, budget.tokens, side="right"))):
        raise UsageError(f"a budget of {budget.tokens} tokens holds no row: the first one costs {int(total[0])}")
    return count


def ensemble_runs(folders: list[Path], methods: list[str] | None, how: How, out: str, budget: Any = None) -> list[Path]:
    """The ensemble of `methods` (None: all) of the runs, per seed, saved as method `out` of the first run.

    Without a budget it is that of the selections where they share one. Errors: `UsageError` for methods that a run lacks,
    for a name that one of its own methods has, and for one that is no name.
    """
    from llmselect.store import FeatureStore, check_folder_name

    check_folder_name(f"out: {out!r}", out)
    found: dict[str, dict[str, Selection]] = {}
    alike = len({folder.name for folder in folders}) < len(folders)  # a/run and b/run are told apart by their whole paths
    for folder in folders:
        for method in _methods(folder, methods, out):
            name = method if len(folders) == 1 else f"{folder if alike else folder.name}/{method}"
            for file in sorted((folder / "selections" / method).glob("seed-*/selection.json")):
                found.setdefault(file.parent.name, {})[name] = Selection.load(file.parent)
    most, written = max(map(len, found.values())), list[Path]()
    cost = np.asarray(FeatureStore(folders[0] / "features")["tokens.supervised"])
    for seed, selections in sorted(found.items()):
        if len(selections) < most:
            log.warning("ensemble: %s is left out, some methods have no selection of it", seed)
            continue
        budgets = [one.provenance.get("budget") for one in selections.values()]
        shared = budgets[0] if all(one == budgets[0] for one in budgets) else None
        made = ensemble(selections, how, budget if budget is not None else shared, cost=cost)
        place = folders[0] / "selections" / out / seed
        replace(made, provenance={**made.provenance, "method": out, "key": {"ensemble": list(selections), "how": how}}).save(
            place
        )
        written.append(place)
    return written


def _methods(folder: Path, wanted: list[str] | None, out: str) -> list[str]:
    """The methods of a run to take; its ensembles are not among all of them."""
    known: dict[str, bool] = {}
    for file in sorted(folder.glob("selections/*/seed-*/selection.json")):
        known[file.parent.parent.name] = Selection.load(file.parent).provenance.get("selector") == "ensemble"
    if not known:
        raise UsageError(f"{folder}: no selections there; give the folder of a run that has selected (runs/NAME)")
    if known.get(out) is False:
        raise UsageError(f"out: {folder} has a method '{out}' of its own; give the ensemble another name")
    for name in wanted or ():
        if name not in known:
            raise UsageError(f"methods: {folder} has no '{name}'.{nearest(name, known)} There are: {list(known)}")
    return wanted or [name for name, made in known.items() if not made]
