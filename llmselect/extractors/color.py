"""How much more the target's model likes a row than a model of the pool does: CoLoR-Filter.

Paper: CoLoR-Filter of Brandfonbrener et al., "Conditional Loss Reduction Filtering for Targeted Language Model Pre-training",
    arXiv 2406.10670, section 3.
Objective: per task `value` = NLL(row | prior) - NLL(row | conditional), each the mean over supervised tokens in nats; take the
    largest (`topk`). The conditional model has seen the task's target rows, the prior a random part of the pool.
Inputs: a causal LM and two LoRA adapters on it per task: `trained`, those of a recipe's `color:` section, or folders.
Cost: a forward for each adapter over the same encoded batches, with the LM head on supervised tokens: two per task, and one
    more for each further fold; 12 bytes a row and task. `color:` trains each on as many tokens as the task's target has.
Deviations: two adapters on one base, trained on equal numbers of supervised tokens; in the paper the conditional model goes on
    from the prior. A task has a prior of its own, trained on as many tokens as its conditional adapter: one prior for tasks of
    different sizes would add the effect of longer training to the score, and a task's rows would depend on the other tasks.
    Rows that share text with the target would score too high: a recipe drops them (`pool.decontaminate`), or scores them by
    an adapter that has not seen their part of the target (`color.folds`), other rows by the mean loss of all folds' adapters.
    The rows that the prior was trained on do score too low: they are a random part of the pool.
Defaults: both `trained`.
Use: a target with rows enough to fine-tune on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from llmselect.engine.extractor import Arrays, Extractor, State
from llmselect.errors import UsageError
from llmselect.folds import Folds, check_complete
from llmselect.registry import extractors

if TYPE_CHECKING:
    import torch

    from llmselect.engine.backbone import Backbone
    from llmselect.engine.batch import Batch

_READY: WeakKeyDictionary[Any, tuple[list[_Column], dict[Path, Any]]] = WeakKeyDictionary()


@dataclass(frozen=True)
class _Column:
    """The adapters of one task: the prior's folder (None: the base model), and one per fold of the conditional."""

    prior: Path | None
    conditional: tuple[Path, ...]
    folds: Folds | None

    @classmethod
    def of(cls, prior: str | None, conditional: str) -> _Column:
        folds = Folds.load(Path(conditional))
        places = (Path(conditional),)
        if folds is not None:
            check_complete(Path(conditional), folds)
            places = folds.places(Path(conditional))
        return cls(None if prior is None else Path(prior), places, folds)


@extractors.register("color")
@dataclass(frozen=True, kw_only=True)
class Color(Extractor):
    """Arrays `value`, and the losses `prior` and `conditional`, float32: `[n, G]`, one column per target group; `[n]` where the
    same folders serve all of them.

    A folder of `conditional` may hold adapters of several folds (`folds.json`, `fold-0` …), as the `color:` section writes them.
    """

    alone = True

    prior: str | dict[str, str] | None = field(
        default="trained", metadata={"help": "adapter folder, one per task {task: folder}, or `trained`; null: the base model"}
    )
    conditional: str | dict[str, str] = field(
        default="trained", metadata={"help": "adapter folder, one per task {task: folder}, or `trained`: the recipe's"}
    )

    @property
    def by_group(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride] - depends on the folders here
        """Whether there are adapters of each target group, and so a column for each."""
        return any(one == "trained" or isinstance(one, Mapping) for one in (self.prior, self.conditional))

    def layers(self, state: State = MappingProxyType({})) -> tuple[int, ...]:
        return ()

    def tasks(self) -> list[str]:
        """The target groups that have adapters of their own, in the order of the columns.

        Errors: `UsageError` when prior and conditional name other tasks.
        """
        named = [list(one) for one in (self.prior, self.conditional) if isinstance(one, Mapping)]
        if any(one != named[0] for one in named):
            raise UsageError(f"prior: folders for {named[0]}, conditional: for {named[1]}; give both for the same tasks in order")
        return named[0] if named else []

    def columns(self) -> list[_Column]:
        """The adapters of each task; one entry where the same folders serve all tasks.

        Errors: `UsageError` for adapters that were not trained.
        """
        if "trained" in (self.prior, self.conditional):
            raise UsageError("prior, conditional: give adapter folders; `trained` needs a recipe with a color: section")
        prior, conditional, tasks = self.prior, self.conditional, self.tasks()
        return [
            _Column.of(
                prior[task] if isinstance(prior, Mapping) else prior,
                conditional[task] if isinstance(conditional, Mapping) else conditional,
            )
            for task in tasks or [""]
        ]

    def adapters(self) -> list[Path | None]:
        """The distinct models that every row is passed through; None is the base model."""
        return list(dict.fromkeys(one for c in self.columns() for one in (c.prior, *c.conditional)))

    def settings(self) -> dict[str, Any]:
        from llmselect.engine.backbone import weights_digest

        def digest(place: Path | None) -> str | None:
            return None if place is None else weights_digest(str(place))

        priors, conditionals = list[str | None](), list[Any]()
        for one in self.columns():
            priors.append(digest(one.prior))
            found = [digest(place) for place in one.conditional]
            conditionals.append(found[0] if one.folds is None else {"folds": found, "rows": one.folds.fingerprint()})
        if not (names := self.tasks()):
            return {"prior": priors[0], "conditional": conditionals[0]}
        return {"prior": dict(zip(names, priors, strict=True)), "conditional": dict(zip(names, conditionals, strict=True))}

    def arrays(self, backbone: Backbone, groups: Sequence[str]) -> Arrays:
        if (named := self.tasks()) and named != list(groups):
            raise UsageError(f"prior, conditional: adapters for {named}, the target groups are {list(groups)}; "
                             "give one for each, in this order")  # fmt: skip
        return dict.fromkeys(("value", "prior", "conditional"), ("float32", (len(named),) if named else ()))

    def rows(self, batch: Batch, state: State) -> dict[str, torch.Tensor]:
        import torch

        from llmselect.engine import moments

        if batch.backbone not in _READY:
            places = [one for one in self.adapters() if one is not None]
            loaded = moments.load(batch.backbone, places, adam=False, reference=False)
            _READY[batch.backbone] = self.columns(), dict(zip(places, loaded, strict=True))
        columns, loaded = _READY[batch.backbone]
        losses: dict[Path | None, torch.Tensor] = {}
        for one in dict.fromkeys(place for c in columns for place in (c.prior, *c.conditional)):
            with moments.at(batch.backbone, None if one is None else loaded[one]):
                stats = batch.measured()
            losses[one] = stats.mean(stats.nll, len(batch.ids))
        prior = torch.stack([losses[one.prior] for one in columns], 1)
        conditional = torch.stack([_held_out(one, losses, batch.names) for one in columns], 1)
        found = {"value": prior - conditional, "prior": prior, "conditional": conditional}
        return found if self.tasks() else {name: values[:, 0] for name, values in found.items()}


def _held_out(column: _Column, losses: Mapping[Path | None, torch.Tensor], names: Sequence[str]) -> torch.Tensor:
    """`[B]` the loss of each row under the conditional adapter that has not seen it, else the mean over the folds."""
    import torch

    of_fold = torch.stack([losses[place] for place in column.conditional], 1)
    if column.folds is None:
        return of_fold[:, 0]
    fold = torch.tensor([column.folds.of.get(name, -1) for name in names], device=of_fold.device)
    own = of_fold.gather(1, fold.clamp_min(0)[:, None])[:, 0]
    return torch.where(fold < 0, of_fold.mean(1), own)
