"""The base of every selector: hyper-parameters as fields, one hook whose keyword-only parameters are its inputs."""

from __future__ import annotations

import inspect
import logging
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from llmselect import config
from llmselect.array_views import Subset
from llmselect.errors import LlmselectError, UsageError, nearest
from llmselect.kernels.keyed import Keyed, keys_of
from llmselect.kernels.topk import topk_stable
from llmselect.selection import Budget, Selection

VOCABULARY = {
    "x": "[n, d] or [n] pool features",
    "target": "[m, d] target features",
    "target_groups": "[m] task of each target row",
    "target_cost": "[m] supervised tokens of the target rows",
    "quality": "[n] scores, or [n, S] where a method says so",
    "groups": "[n] source or cluster",
    "cost": "[n] supervised tokens",
}
OF_TARGET = ("target", "target_groups", "target_cost")
log = logging.getLogger("llmselect")


@dataclass(frozen=True)
class Picked:
    """What a `pick` hook returns: rows in rank order and, if it has them, scores, weights and evidence per picked row, and
    a report (plain JSON) on how they were found."""

    order: np.ndarray
    scores: np.ndarray | None = None
    weights: np.ndarray | None = None
    evidence: dict[str, np.ndarray] | None = None
    report: dict[str, Any] | None = None


@dataclass(frozen=True)
class Selector:
    """A method. A subclass has exactly one hook:

    `score(self, rng, *, x, …) -> [n]`, higher is better, or `pick(self, k, rng, *, x, …) -> Picked` of k rows.
    """

    name: ClassVar[str]
    nested: ClassVar[bool] = True  # prefixes of a selection are the selections of smaller budgets
    stochastic: ClassVar[bool] = False  # the seed matters
    chooses_size: ClassVar[bool] = False  # the budget is an upper limit
    x_ndim: ClassVar[tuple[int, ...]] = (2,)
    quality_ndim: ClassVar[tuple[int, ...]] = (1,)
    x_sign: ClassVar[str] = "any"  # or "nonnegative"
    sparse: ClassVar[bool] = False  # whether x may be sparse
    lazy: ClassVar[tuple[str, ...]] = ()  # inputs of which only the rows asked for may be computed

    def select(self, budget: Any, *, seed: int = 0, ids: Any = None, n: int | None = None, exclude: Any = None,
               **inputs: Any) -> Selection:  # fmt: skip
        """Select rows within `budget`.

        Args:
            budget: rows, `"5%"`, `{fraction: …}` or `{tokens: …}` (needs `cost`); exact, never over.
            seed: of every random draw; draws are keyed by row id, so the order of the pool does not matter.
            ids: row ids; taken from `x.ids` where there are any, else row numbers.
            n: rows of the pool, for a method without inputs.
            exclude: row numbers that are never selected, as if the pool did not hold them.
            inputs: arrays of the vocabulary that the hook declares; `cost` may always be given.

        Errors: `UsageError` for missing, unknown or mismatched inputs and impossible budgets; `LlmselectError` naming
        rows whose scores are not finite.
        """
        budget = Budget.parse(budget)
        cost = inputs.get("cost")
        cost = cost if cost is None or not hasattr(cost, "shape") else cost[:]
        given, inputs = inputs, self._checked(inputs)
        n = self._rows(n, ids, cost, inputs)
        ids = ids if ids is not None else getattr(inputs.get("x"), "ids", None)
        keys, bad = keys_of(ids, n), _not_finite({k: given[k] for k in inputs})  # a checked input may be a copy without marks
        lost = bad if exclude is None else np.union1d(bad, _row_numbers(exclude, n))
        rows = np.delete(np.arange(n), lost)
        if not len(rows):
            why = "has finite features" if exclude is None or len(bad) == n else f"is left by the {len(lost) - len(bad)} excluded"
            raise LlmselectError(f"'{self.name}': none of {n} rows {why}; nothing can be ranked")
        if len(bad):
            log.warning("%s: %d rows are left out: their features are not finite", self.name, len(bad))
        if len(lost):
            keys, cost = keys[rows], None if cost is None else np.asarray(cost)[rows]
            inputs = {k: v if k in OF_TARGET else _aside(k, v, rows) for k, v in inputs.items()}
        if budget.tokens is None:
            picked = self._pick(min(budget.rows_of(n), len(rows)), Keyed(seed, keys), inputs)
        else:
            picked = self._pick_tokens(budget.tokens, len(rows), cost, Keyed(seed, keys), inputs)
        made = {"selector": self.name, "config": config.to_dict(self), "seed": seed, "budget": budget.plain(), "n": n,
                **({"not_finite": len(bad)} if len(bad) else {}), **({"report": picked.report} if picked.report else {}),
                **({"excluded": len(lost) - len(bad)} if len(lost) > len(bad) else {})}  # fmt: skip
        order, scores = rows[picked.order], picked.scores
        if len(lost) and scores is not None:
            # Counts are whole numbers, among which there is none for a row without a score.
            scores = np.full((n, *scores.shape[1:]), np.nan, np.result_type(scores, np.float16))
            scores[rows] = picked.scores
        chosen = None if ids is None else [ids[int(i)] for i in order]
        return Selection(order, n, scores, picked.weights, picked.evidence or {}, self.nested, made, chosen)

    def _pick(self, k: int, rng: Keyed, inputs: dict[str, Any]) -> Picked:
        method: Any = self
        if hasattr(method, "pick"):
            return method.pick(k, rng, **inputs)
        scores = np.asarray(method.score(rng, **inputs))
        return Picked(topk_stable(scores, k, rng.keys), scores)

    def _pick_tokens(self, tokens: int, n: int, cost: Any, rng: Keyed, inputs: dict[str, Any]) -> Picked:
        """The longest prefix of the ranking that costs at most `tokens`; the ranking grows until it is long enough."""
        cost = token_costs(cost, n)
        k = n if self.chooses_size else min(n, max(16, int(1.2 * tokens / max(1.0, float(cost.mean())))))
        while True:
            picked = self._pick(k, rng, inputs)
            total = np.cumsum(cost[picked.order])
            if k == n or (len(total) and total[-1] > tokens):
                break
            k = min(n, 2 * k)
        fits = int(np.searchsorted(total, tokens, side="right"))
        if not fits:
            raise UsageError(f"a budget of {tokens} tokens holds no row: the first one costs {int(total[0])}")
        cut = {name: values[:fits] for name, values in (picked.evidence or {}).items()}
        weights = None if picked.weights is None else picked.weights[:fits]
        return Picked(picked.order[:fits], picked.scores, weights, cut, picked.report)

    def _checked(self, inputs: dict[str, Any]) -> dict[str, Any]:
        wanted = inputs_of(type(self))
        for name in inputs:
            if name not in wanted and name != "cost":
                raise UsageError(f"'{self.name}' takes no {name}.{nearest(name, wanted)} Its inputs: {list(wanted) or 'none'}")
        for name, required in wanted.items():
            if required and inputs.get(name) is None:
                raise UsageError(f"'{self.name}' needs {name}=, {VOCABULARY[name]}")
        kept = {name: value for name, value in inputs.items() if name in wanted and value is not None}
        for name, value in kept.items():
            if hasattr(value, "lazy") and name not in self.lazy:
                raise UsageError(f"'{self.name}' reads all of {name}, which is computed on demand; give the feature lazy: false")
            if not hasattr(value, "shape"):
                kept[name] = np.asarray(value)
            elif name != "x" and not hasattr(value, "lazy"):  # only the features may be too large to hold
                held = value[:]
                kept[name] = held.toarray() if hasattr(held, "toarray") else np.asarray(held)
        for name, axes in (("x", self.x_ndim), ("quality", self.quality_ndim)):
            if name in kept and kept[name].shape[1:] == (1,) and 2 not in axes and not hasattr(kept[name], "lazy"):
                kept[name] = np.asarray(kept[name][:])[:, 0]  # the scores of one task
        x, target, quality = kept.get("x"), kept.get("target"), kept.get("quality")
        if quality is not None and len(quality.shape) == 2 and quality.shape[1] == 1 and 2 not in self.quality_ndim:
            kept["quality"] = quality = quality[:, 0]  # e.g. a norm at the one checkpoint
        if quality is not None and len(quality.shape) not in self.quality_ndim:
            allowed = " or ".join(map(str, self.quality_ndim))
            raise UsageError(f"quality has shape {tuple(quality.shape)}; '{self.name}' reads {allowed} axes")
        if (hasattr(x, "width") or hasattr(x, "indptr")) and not self.sparse:
            raise UsageError(f"'{self.name}' reads dense features and x is sparse; give a dense one, e.g. an embedding")
        if x is not None and len(x.shape) not in self.x_ndim:
            raise UsageError(
                f"'{self.name}': x has shape {tuple(x.shape)}; it must have {' or '.join(map(str, self.x_ndim))} axes"
            )
        for name in ("target", "target_cost"):
            if name in kept and not kept[name].shape[0]:
                raise UsageError(f"{name} has no rows: give at least one example to select for")
        if x is not None and target is not None and tuple(x.shape[1:]) != tuple(target.shape[1:]):
            raise UsageError(f"x {tuple(x.shape)} and target {tuple(target.shape)} must have the same number of columns")
        return kept

    def _rows(self, n: int | None, ids: Any, cost: Any, inputs: dict[str, Any]) -> int:
        per_row = {k: v for k, v in inputs.items() if k not in OF_TARGET}
        lengths = {name: len(v) if not hasattr(v, "shape") else v.shape[0] for name, v in per_row.items()}
        lengths |= {name: len(v) for name, v in (("ids", ids), ("cost", cost)) if v is not None}
        lengths |= {"n": n} if n is not None else {}
        if not lengths:
            raise UsageError(f"'{self.name}' cannot tell how many rows there are: give n=, ids= or cost=")
        if len(set(lengths.values())) > 1:
            raise UsageError(f"inputs disagree on the number of rows: {lengths}")
        rows = next(iter(lengths.values()))
        if rows == 0:
            raise LlmselectError("the pool is empty")
        of_target = {name: inputs[name].shape[0] for name in OF_TARGET if name in inputs}
        if len(set(of_target.values())) > 1:
            raise UsageError(f"inputs disagree on the number of target rows: {of_target}")
        return rows


def _not_finite(inputs: dict[str, Any]) -> np.ndarray:
    """Rows that the store marked as not finite in some feature; arrays made by hand are checked where they are ranked."""
    marked = [v.non_finite for k, v in inputs.items() if k not in OF_TARGET and hasattr(v, "non_finite")]
    return np.unique(np.concatenate(marked)) if marked else np.zeros(0, np.int64)


def token_costs(cost: Any, n: int) -> np.ndarray:
    """`[n]` int64, what a budget in tokens counts. Errors: `UsageError` without them, or where they count no tokens."""
    if cost is None or len(cost) != n:
        raise UsageError("a budget in tokens needs cost=, the supervised tokens of each row")
    cost = np.asarray(cost)
    if len(bad := np.flatnonzero(~(np.isfinite(cost) & (cost >= 0) & (cost == np.floor(cost))))):
        held = cost[bad[:5]].tolist()
        raise UsageError(f"cost: rows {bad[:5].tolist()} hold {held}; give whole numbers of tokens, 0 or more")
    return cost.astype(np.int64)


def _row_numbers(rows: Any, n: int) -> np.ndarray:
    rows = np.asarray(rows)
    if len(rows) and not np.issubdtype(rows.dtype, np.integer):
        mask = "; of a mask, np.flatnonzero(mask)" if rows.dtype == bool else ""
        raise UsageError(f"exclude: {rows.dtype} values are no row numbers; give whole numbers{mask}")
    rows = rows.astype(np.int64)
    if len(rows) and not 0 <= rows.min() <= rows.max() < n:
        raise UsageError(f"exclude: row numbers are between 0 and {n - 1}")
    return rows


def _aside(name: str, values: Any, rows: np.ndarray) -> Any:
    """An input without the rows that are left out; `x` and what is computed on demand is not read for that."""
    return Subset(values, rows) if name == "x" or hasattr(values, "lazy") else values[rows]


def inputs_of(cls: type[Any]) -> dict[str, bool]:
    """The inputs a selector's hook declares, and whether each is required."""
    hook = cls.pick if hasattr(cls, "pick") else cls.score
    parameters = inspect.signature(hook).parameters.values()
    return {p.name: p.default is inspect.Parameter.empty for p in parameters if p.kind is p.KEYWORD_ONLY}
