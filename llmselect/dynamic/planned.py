"""Schedules whose rows are known before training: those that steps of equal supervised tokens can follow."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llmselect import config, registry
from llmselect.dynamic.schedules._base import EpochSchedule
from llmselect.errors import UsageError
from llmselect.kernels.keyed import Keyed, keys_of


def planned(settings: Mapping[str, Any] | None) -> EpochSchedule | None:
    """The schedule that `train.schedule` names, for example `{name: rs2, budget: 10%}`.

    Steps of equal tokens are laid out as a whole before the first one, and every token counts the same in them: rows that
    depend on losses, or that have weights, would change what is compared.

    Errors: `UsageError` for an unknown name, setting or value, and for a schedule with losses or weights.
    """
    if settings is None:
        return None
    rest = dict(settings)
    if not isinstance(name := rest.pop("name", None), str):
        raise UsageError(f"train.schedule.name: missing; one of {', '.join(registry.schedules.names())}")
    made = config.from_dict(registry.schedules.get(name), rest, "train.schedule")
    if made.needs_losses or getattr(made, "weights", None):
        why = "follows the losses of a training" if made.needs_losses else "weighs rows"
        raise UsageError(
            f"train.schedule: '{name}' {why}, and steps of equal tokens are planned before it starts; "
            "use llmselect.dynamic.attach(trainer, schedule) with a Trainer of your own"
        )
    return made


def planned_order(settings: Mapping[str, Any] | None, epochs: int, ids: Sequence[str],
                  seed: int) -> Callable[[int], Sequence[int]] | None:  # fmt: skip
    """The rows of each epoch by its number, or None without a schedule."""
    if (made := planned(settings)) is None:
        return None
    rng = Keyed(seed, keys_of(ids, len(ids)))
    return lambda epoch: made.rows(epoch, epochs, len(ids), rng).indices.tolist()
