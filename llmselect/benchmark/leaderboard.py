"""The leaderboard: from the files of the cells alone, the same text for the same files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from llmselect.benchmark.grid import BASE, BASELINES, FULL
from llmselect.benchmark.results import Result, load_all
from llmselect.benchmark.statistics import Difference, holm, paired

RANDOM = "random"
Measured = dict[str, dict[int, Result]]  # target → seed → result
Arms = dict[tuple[str, str], Measured]  # by method and budget


@dataclass(frozen=True)
class Line:
    """One method at one budget, over the targets where it was measured."""

    method: str
    budget: str
    targets: int
    seeds: int
    nll: float
    sd: float | None
    difference: Difference | None
    holm: float | None
    wins: int | None
    compared: int
    kept: float | None
    seconds: float
    forwards: float
    rows: float


def arms(results: Sequence[Result]) -> Arms:
    """Results of one grid and model by method and budget, target and seed."""
    found: Arms = {}
    for one in results:
        found.setdefault((one.method, one.budget), {}).setdefault(one.target, {})[one.seed] = one
    return found


def lines(found: Arms) -> list[Line]:
    """All methods and budgets, each with its paired difference to random, adjusted for all comparisons of the table."""
    made = [_line(found, *arm) for arm in found]
    compared = {i: one.difference.p for i, one in enumerate(made) if one.difference is not None}
    for i, p in zip(compared, holm([*compared.values()]), strict=True):
        made[i] = replace(made[i], holm=p)
    return made


def _line(found: Arms, method: str, budget: str) -> Line:
    own = found[method, budget]
    first, *others = own.values()
    seeds = sorted(set(first).intersection(*others))
    per_seed = [np.mean([by_seed[s].nll for by_seed in own.values()]) for s in seeds]
    nll = float(np.mean([np.mean([one.nll for one in by_seed.values()]) for by_seed in own.values()]))
    pairs = {} if method in (BASE, FULL, RANDOM) else _pairs(own, _random_for(found, own, budget))
    wins = sum(np.mean([v.mean() for v in tasks.values()]) < 0 for tasks in pairs.values())
    cells = [list(by_seed.values()) for by_seed in own.values()]
    # Rows computed on demand are paid by the first seed that asks, so the dearest seed tells the cost.
    seconds = np.mean([max(c.seconds["features"] + c.seconds["select"] for c in group) for group in cells])
    forwards = np.mean([max(c.forwards for c in group) for group in cells])
    return Line(method, budget, len(own), len(seeds), nll, float(np.std(per_seed, ddof=1)) if len(seeds) > 1 else None,
                paired(pairs) if pairs else None, None, int(wins) if pairs else None, len(pairs), _kept(found, own),
                float(seconds), float(forwards), float(np.mean([c.rows for group in cells for c in group])))  # fmt: skip


def _random_for(found: Arms, own: Measured, budget: str) -> Measured:
    """Random at the same budget; a method that chose its own size is set beside the nearest number of rows."""
    if (RANDOM, budget) in found:
        return found[RANDOM, budget]

    def rows(group: Measured) -> float:
        return float(np.mean([c.rows for by_seed in group.values() for c in by_seed.values()]))

    known = [group for (method, _), group in found.items() if method == RANDOM]
    return min(known, key=lambda group: abs(rows(group) - rows(own)), default=Measured()) if budget == "100%" else {}


def _pairs(own: Measured, other: Measured) -> dict[str, dict[str, np.ndarray]]:
    """Target → task → `[seeds, rows]` differences on the seeds that both have."""
    pairs = dict[str, dict[str, np.ndarray]]()
    for target, mine in own.items():
        theirs = other.get(target, {})
        if seeds := sorted(set(mine) & set(theirs)):
            tasks = sorted(mine[seeds[0]].losses)
            pairs[target] = {t: np.stack([mine[s].losses[t] - theirs[s].losses[t] for s in seeds]) for t in tasks}
    return pairs


def _kept(found: Arms, own: Measured) -> float | None:
    """Σ over targets of what the method gained on the base model, as a share of what all data gained."""
    base, full = found.get((BASE, "0%"), {}), found.get((FULL, "100%"), {})
    shared = [t for t in own if t in base and t in full]

    def mean(group: Measured, target: str) -> float:
        return float(np.mean([one.nll for one in group[target].values()]))

    whole = sum(mean(base, t) - mean(full, t) for t in shared)
    return sum(mean(base, t) - mean(own, t) for t in shared) / whole if whole > 0 else None


def leaderboard(folder: Path) -> str:
    """The text for all results below `folder`."""
    results, out = load_all(folder), ["# Leaderboard of selectors", ""]
    if not results:
        return "\n".join([*out, "No cell has been measured yet. `llmselect benchmark GRID.yaml` measures them, "
                          "`llmselect leaderboard` writes this file again.", ""])  # fmt: skip
    for grid, model in sorted({(one.grid, one.model) for one in results}):
        out += _section(grid, model, [one for one in results if (one.grid, one.model) == (grid, model)])
    return "\n".join([*out, *_NOTES, ""])


def _section(grid: str, model: str, results: list[Result]) -> list[str]:
    found = arms(results)
    targets = sorted({one.target for one in results})
    made = lines(found)
    out = [f"## {grid}: {model}", "", f"{len(results)} cells; targets: {', '.join(targets)}.", ""]
    budgets = [b for _, b in found if b not in ("0%", "100%")]
    order = sorted(set(budgets), key=lambda b: min(line.rows for line in made if line.budget == b))
    ends = [one for one in made if one.method in (BASE, FULL)]
    for budget in [*order, *(["100%"] if any(o.budget == "100%" and o.method != FULL for o in made) else [])]:
        here = [one for one in made if one.budget == budget and one.method != FULL]
        title = "Methods that choose their own size" if budget == "100%" else f"Budget {budget}"
        out += [f"### {title}", "", _HEAD, "|---|" + "---:|" * (_HEAD.count("|") - 2)]
        out += [_text(one, len(targets)) for one in sorted(here, key=_rank)]
        lacking = [name for name in BASELINES if name not in {one.method for one in here}] if budget != "100%" else []
        out += [f"| {name} | not measured |" + " |" * (_HEAD.count("|") - 3) for name in lacking]
        out += [*(_text(one, len(targets)) for one in ends), ""]
    return out


def _rank(line: Line) -> tuple[float, str]:
    """Most below random first: methods may have been measured on different targets, differences remain comparable."""
    return (0.0 if line.difference is None else line.difference.mean, line.method)


_HEAD = ("| method | targets | seeds | NLL ± sd | Δ random [95 %] | p (Holm) | wins | full gain kept | select s | forwards |")
_NOTES = [
    "NLL: held-out response loss in nats per token, mean over targets; sd over seeds. Δ random: difference to random rows of",
    "the same seed and budget, negative is better; 95 % interval and p from a paired bootstrap over seeds and held-out rows.",
    "With three seeds the interval tells less than the whole spread over seeds. p is adjusted by Holm for all comparisons of a",
    "grid and model, so that the chance of any false one is 5 % at p < 0.05. Wins: targets with a lower mean loss than random.",
    "Full gain kept: the drop from the base model as a share of the drop by all data, at equal tokens. Select s: features of the",
    "whole pool, each extracted by itself, and the selection; forwards: forward passes over the pool that they amount to.",
    "Methods measured on fewer targets than others have an NLL of their own targets: compare their Δ.",
    "",
    "Large studies (arXiv 2503.01807, 2410.09335) find that most methods do not beat random at scale.",
]


def _text(line: Line, targets: int) -> str:
    d = line.difference
    cells = [
        line.method,
        f"{line.targets}/{targets}",
        "" if line.method == BASE else str(line.seeds),
        f"{line.nll:.4f}" + ("" if line.sd is None else f" ± {line.sd:.4f}"),
        "" if d is None else f"{d.mean:+.4f} [{d.low:+.4f}, {d.high:+.4f}]",
        "" if line.holm is None else f"{line.holm:.2g}",
        "" if line.wins is None else f"{line.wins}/{line.compared}",
        "" if line.kept is None or line.method in (BASE, FULL) else f"{line.kept:.0%}",
        "" if line.method in (BASE, FULL) else f"{line.seconds:.1f}",
        "" if line.method in (BASE, FULL) else f"{line.forwards:.2f}",
    ]
    return "| " + " | ".join(cells) + " |"
