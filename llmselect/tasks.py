"""Selecting for some of a run's tasks: features are computed once for all of them, and a method takes its own part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from llmselect.array_views import GroupColumns
from llmselect.errors import UsageError, nearest
from llmselect.plain import is_list
from llmselect.selectors._base import OF_TARGET, inputs_of

if TYPE_CHECKING:
    from llmselect.recipe import Recipe
    from llmselect.stages import Run


@dataclass(frozen=True)
class Tasks:
    """Part of the target rows of a run: their numbers, and the places of their groups among all groups as these appear
    (`columns`), and as their names sort (`ordered`)."""

    rows: np.ndarray
    columns: np.ndarray
    ordered: np.ndarray

    def pool_side(self, array: Any) -> Any:
        """An `[n, G, …]` array with the columns of these groups only."""
        return GroupColumns(array, self.columns)

    def target_side(self, values: Any) -> np.ndarray:
        """A `[m, …]` array of the target rows with these rows only."""
        return values[self.rows]

    def evidence(self, found: Mapping[str, np.ndarray], selector: str, features: int = 1) -> dict[str, np.ndarray]:
        """Evidence with target rows and groups numbered as in the run. Quotas number within a group, which stays whole; the
        columns of several `features` side by side have no numbers in a run."""
        out = dict(found)
        if "quota" not in out:
            # `topk` counts columns of a feature; selectors that read targets count the sorted names of their groups.
            groups = self.columns if selector == "topk" else self.ordered
            places = {"nearest": self.rows, "query": self.rows, "group": groups}
            if selector == "topk" and features > 1:
                del places["group"]
            out |= {name: to[out[name]] for name, to in places.items() if name in out and out[name].dtype.kind in "iu"}
        return out


def tasks_of(run: Run, method: str) -> Tasks | None:
    """The tasks that `method` selects for; None for all."""
    names = run.recipe.tasks_of(method)
    if names is None:
        return None
    target: Any = run.target
    groups: list[str] = list(target["group"])
    every = list(dict.fromkeys(groups))
    counts = [len(run.opened(f"targets/{name}")) for name in run.recipe.targets]
    ends: dict[str, int] = dict(zip(run.recipe.targets, np.cumsum(counts).tolist(), strict=True))
    sizes = dict(zip(run.recipe.targets, counts, strict=True))
    rows = np.concatenate([np.arange(ends[name] - sizes[name], ends[name]) for name in run.recipe.targets if name in names])
    mine = list(dict.fromkeys(groups[int(row)] for row in rows))
    return Tasks(rows, np.array([every.index(one) for one in mine]), np.array([sorted(every).index(one) for one in sorted(mine)]))


def aimed(recipe: Recipe, method: str) -> bool:
    """Whether what `method` selects depends on the target rows: the selector reads them, or a feature of it has a column
    for each of their groups."""
    from llmselect.recipe import features_in

    selector, reads = recipe.selector(method)
    asks = bool(set(OF_TARGET) & set(inputs_of(type(selector))))
    features = {name.partition(".")[0] for read in reads.values() for name in features_in(read)} & set(recipe.features)
    return asks or any(recipe.extractor(name).by_group for name in features)


def check_tasks(recipe: Recipe, method: str) -> None:
    """Errors: `UsageError` when a method names tasks that are not there, or selects the same whatever the task."""
    given, where = recipe.methods[method].get("tasks"), f"methods.{method}.tasks"
    if given is None:
        return
    if not is_list(given) or not given:
        raise UsageError(f"{where}: give a list of targets, e.g. [{next(iter(recipe.targets))}]")
    for name in given:
        if name not in recipe.targets:
            known = list(recipe.targets)
            raise UsageError(f"{where}: no target '{name}'.{nearest(str(name), known)} There are: {known}")
    if not aimed(recipe, method):
        selector = recipe.selector(method)[0].name
        raise UsageError(f"{where}: '{selector}' selects the same rows whatever the task; leave tasks out")
