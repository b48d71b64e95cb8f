"""Selection that changes while the model trains: which rows each epoch sees, and with what weight.

`attach(trainer, schedule)` makes a transformers `Trainer` or a TRL `SFTTrainer` follow a schedule; `EpochState` and
`EpochSampler` do so in a loop of your own. Importing this package loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmselect.dynamic.callback import EpochCallback
    from llmselect.dynamic.sampler import EpochSampler
    from llmselect.dynamic.schedules._base import EpochSchedule
    from llmselect.dynamic.state import EpochState
    from llmselect.dynamic.trainer import attach

_HOME = {
    "EpochCallback": "callback",
    "EpochSampler": "sampler",
    "EpochSchedule": "schedules._base",
    "EpochState": "state",
    "attach": "trainer",
}

__all__ = ["EpochCallback", "EpochSampler", "EpochSchedule", "EpochState", "attach"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"llmselect.dynamic.{_HOME[name]}"), name)
    if name.startswith("_"):
        raise AttributeError(name)
    from llmselect.registry import schedules

    return schedules.by_class_name(name)
