"""Limits on what a selection may hold, around any selector: caps, floors and proportions of sources, quotas of targets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from llmselect.errors import UsageError, nearest
from llmselect.selection import Budget, Selection
from llmselect.selectors._base import Selector, inputs_of, token_costs

REST = "*"
Inputs = dict[str, Any]
Amounts = dict[str, float]  # by source or group: a share of the budget, or rows or tokens


@dataclass(frozen=True)
class Limits:
    """Bounds by source (`caps`, `floors`, `proportions`) and by target group (`quotas`).

    A number up to 1 is a share of the budget, a larger one counts rows, or tokens when the budget is in tokens. `"*"`
    stands for each source that is not named; in `proportions` for all of them together.
    """

    caps: Amounts = field(default_factory=Amounts, metadata={"help": "at most, e.g. {wiki: 0.3, '*': 0.5}"})
    floors: Amounts = field(default_factory=Amounts, metadata={"help": "at least, as far as the source has rows"})
    proportions: Amounts = field(default_factory=Amounts, metadata={"help": "exactly, e.g. {math: 0.5, '*': 0.5}"})
    quotas: Amounts = field(default_factory=Amounts, metadata={"help": "share of the picks that each target makes"})

    def __post_init__(self) -> None:
        for kind in ("caps", "floors", "proportions", "quotas"):
            for name, value in getattr(self, kind).items():
                if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
                    raise UsageError(f"limits.{kind}.{name}: {value!r} is neither a share (0.25) nor a whole number")
                if value > 1 and value != int(value):
                    raise UsageError(f"limits.{kind}.{name}: {value} is neither a share up to 1 nor a whole number")
        if self.proportions and (self.caps or self.floors):
            raise UsageError("limits: proportions fix every source; give them without caps and floors")
        for kind in ("proportions", "quotas"):
            if sum(getattr(self, kind).values()) > 1 + 1e-9:
                raise UsageError(f"limits.{kind}: the shares sum to {sum(getattr(self, kind).values()):g}, more than 1")


def select_within(selector: Selector, budget: Any, limits: Limits, *, groups: Any, seed: int = 0, ids: Any = None,
                  cost: Any = None, exclude: Any = None, **inputs: Any) -> Selection:  # fmt: skip
    """The best rows of `selector`'s ranking that keep `limits`; the budget is met exactly (tokens: never exceeded).

    Rows are taken in rank order. A row is passed over when its source is full, or when taking it would leave too little for
    floors not yet met: for an additive score this is the best subset within the limits. With `quotas` every target group
    ranks the pool alone, and groups take turns in proportion to their shares (±1 row).

    Args:
        groups: `[n]` source of each row.
        inputs: of the selector; `target_groups` names the target groups that `quotas` are of.

    Errors: `UsageError` for unknown sources or groups, and for limits that no subset meets.
    """
    parsed, groups = Budget.parse(budget), np.asarray(groups).astype(str)
    n = len(groups)
    price = np.ones(n, np.int64) if parsed.tokens is None else token_costs(cost, n)
    total = parsed.rows_of(n) if parsed.tokens is None else parsed.tokens
    held = np.setdiff1d(np.arange(n), np.asarray([] if exclude is None else exclude, np.int64))
    bounds = _Bounds(limits, groups, price, total, held)
    tasks = _tasks(selector, limits, inputs, groups)
    shared: dict[str, Any] = {"seed": seed, "ids": ids, "exclude": exclude, "n": n}
    if "cost" in inputs_of(type(selector)):
        shared["cost"] = cost
    depth = len(held) if selector.chooses_size else min(len(held), max(16, 2 * int(total / max(1.0, float(price.mean())))))
    while True:
        ranked = {name: selector.select({"rows": depth}, **shared, **own) for name, (own, _) in tasks.items()}
        taken, by = _walk(ranked, {name: share for name, (_, share) in tasks.items()}, bounds, groups, price, total)
        if depth == len(held) or bounds.full(taken, groups, price, total):
            break
        depth = min(len(held), 2 * depth)
    if not len(taken):
        raise UsageError(f"limits: no row fits into a budget of {total} within {asdict(limits)}")
    return _selection(ranked, taken, by, limits, parsed, ids, bool(limits.quotas))


class _Bounds:
    """Least and most of each source, in rows or tokens."""

    def __init__(self, limits: Limits, groups: np.ndarray, price: np.ndarray, total: int, held: np.ndarray):
        names, inverse = np.unique(groups[held], return_inverse=True)
        there = dict(zip(names.tolist(), np.bincount(inverse, price[held], len(names)).astype(np.int64).tolist(), strict=True))
        for kind in ("caps", "floors", "proportions"):
            for name in getattr(limits, kind):
                if name != REST and name not in there:
                    known = sorted(there)[:20]
                    raise UsageError(f"limits.{kind}.{name}: no such source.{nearest(name, there)} There are: {known}")
        self.rest = sorted(set(there) - set(limits.proportions)) if limits.proportions else []
        self.together = total  # the most that these have together
        self.low, self.high = dict.fromkeys(there, 0), dict(there)
        for name in there:
            cap, floor = (kind.get(name, kind.get(REST)) for kind in (limits.caps, limits.floors))
            self.high[name] = there[name] if cap is None else min(there[name], _units(cap, total))
            self.low[name] = 0 if floor is None else min(self.high[name], _units(floor, total, up=True))
        if limits.proportions:
            self._exact(limits.proportions, there, total)
        if sum(self.low.values()) > total:
            raise UsageError(f"limits.floors: they sum to {sum(self.low.values())}, more than the budget of {total}")
        if total <= int(price[held].sum()) and sum(self.high.values()) < total and len(held) and (price[held] == 1).all():
            raise UsageError(f"limits: they allow {sum(self.high.values())} rows of the {total} in the budget; raise a cap or "
                             "lower the budget")  # fmt: skip

    def _exact(self, shares: Mapping[str, float], there: dict[str, int], total: int) -> None:
        from llmselect.kernels.groups import apportion

        named = {name: share for name, share in shares.items() if name != REST}
        others = shares.get(REST, 0 if sum(named.values()) >= 1 - 1e-9 or not self.rest else 1 - sum(named.values()))
        weights = [*named.values(), others]
        parts = apportion(total, weights, [*(total for _ in named), total if others else 0]).tolist()
        for name, units in zip(named, parts, strict=False):
            if units > there[name]:
                raise UsageError(f"limits.proportions.{name}: {units} wanted, the pool has {there[name]}")
            self.low[name] = self.high[name] = units
        self.together = parts[-1]
        for name in self.rest:
            self.low[name], self.high[name] = 0, min(there[name], self.together)

    def full(self, taken: np.ndarray, groups: np.ndarray, price: np.ndarray, total: int) -> bool:
        """Whether looking deeper into the ranking could change nothing."""
        spent = int(price[taken].sum())
        low = {name: int(price[taken[groups[taken] == name]].sum()) < low for name, low in self.low.items() if low}
        return not any(low.values()) and (spent == total or (price.max() > 1 and spent > total - int(price.max())))


def _units(value: float, total: int, up: bool = False) -> int:
    if value > 1:
        return int(value)
    return int(np.ceil(value * total - 1e-9)) if up else int(value * total + 1e-9)


def _tasks(selector: Selector, limits: Limits, inputs: Inputs, groups: np.ndarray) -> dict[str, tuple[Inputs, float]]:
    """The selector's inputs for each target group that ranks alone, and its share of the picks."""
    wanted = inputs_of(type(selector))
    named = inputs.get("target_groups")
    inputs = {k: v for k, v in inputs.items() if k in wanted} | ({"groups": groups} if "groups" in wanted else {})
    if not limits.quotas:
        return {"": (inputs, 1.0)}
    known = [] if named is None else list(dict.fromkeys(np.asarray(named).tolist()))
    for name in limits.quotas:
        if name not in known:
            raise UsageError(f"limits.quotas.{name}: no such target group.{nearest(name, known)} There are: {known}")
    found = dict[str, tuple[Inputs, float]]()
    for name, share in limits.quotas.items():
        rows = np.asarray(named) == name
        if "target" in wanted:
            own = {**inputs, "target": inputs["target"][np.flatnonzero(rows)]}
            found[name] = ({**own, "target_groups": np.asarray(named)[rows]} if "target_groups" in wanted else own, share)
        elif "x" in inputs and len(inputs["x"].shape) == 2 and inputs["x"].shape[1] == len(known):
            found[name] = ({**inputs, "x": np.asarray(inputs["x"][:])[:, known.index(name)]}, share)
        else:
            raise UsageError(f"limits.quotas: '{selector.name}' reads neither target rows nor one score per target group")
    return {name: one for name, one in found.items() if one[1] > 0}


def _walk(ranked: dict[str, Selection], shares: dict[str, float], bounds: _Bounds, groups: np.ndarray, price: np.ndarray,
          total: int) -> tuple[np.ndarray, list[str]]:  # fmt: skip
    """Rows in the order taken, and the task that took each."""
    spent, mine = dict.fromkeys(bounds.low, 0), dict.fromkeys(ranked, 0)
    unmet, left, closed = sum(bounds.low.values()), total, set[str]()
    lists = {name: iter(one.indices.tolist()) for name, one in ranked.items()}
    taken: dict[int, str] = {}
    while lists and left > 0:
        task = min(lists, key=lambda name: ((mine[name] + 0.5) / shares[name], name))
        for row in lists[task]:
            source, units = str(groups[row]), int(price[row])
            if row in taken or source in closed:
                continue
            need = max(0, bounds.low[source] - spent[source])
            others = sum(spent[name] for name in bounds.rest) if source in bounds.rest else 0
            if spent[source] + units > bounds.high[source] or (source in bounds.rest and others + units > bounds.together):
                closed.add(source)  # as with a token budget: a source ends at its first row that does not fit
                continue
            if units > left - (unmet - min(need, units)):
                if not need and units > 1:
                    closed.add(source)
                continue
            taken[row] = task
            spent[source], left, unmet = spent[source] + units, left - units, unmet - min(need, units)
            mine[task] += units
            break
        else:
            del lists[task]
    return np.fromiter(taken, np.int64, len(taken)), list(taken.values())


def _selection(ranked: dict[str, Selection], taken: np.ndarray, by: list[str], limits: Limits, budget: Budget, ids: Any,
               quotas: bool) -> Selection:  # fmt: skip
    first = next(iter(ranked.values()))
    evidence: dict[str, np.ndarray] = {}
    place = {name: dict(zip(one.indices.tolist(), range(len(one)), strict=True)) for name, one in ranked.items()}
    for key in first.evidence:
        values = [ranked[task].evidence[key][place[task][row]] for row, task in zip(taken.tolist(), by, strict=True)]
        evidence[key] = np.asarray(values, first.evidence[key].dtype)
    if quotas:
        evidence["quota"] = np.array(by)
    about = {**first.provenance, "budget": budget.plain(), "limits": asdict(limits)}
    scores = None if quotas else first.scores
    chosen = None if ids is None else [ids[int(i)] for i in taken]
    return Selection(taken, first.n, scores, None, evidence, False, about, chosen)
