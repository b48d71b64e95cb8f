"""Does a row depend on the rows that lie beside it in a batch? In half precision, attention kernels can make it so."""

from __future__ import annotations

# datasets has no types.
# pyright: reportMissingTypeStubs=false, reportUnknownVariableType=false
import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from datasets import Dataset

    from llmselect.engine.passes import Pass

log = logging.getLogger("llmselect")
TOLERANCE = 0.02  # bfloat16 keeps 8 bits: sums in another order alone give about a hundredth
ROWS = 4


def batch_dependence(run: Pass, messages: list[Any], ids: list[str]) -> dict[str, float]:
    """Per feature the largest ‖together - alone‖ / ‖alone‖ of a row, over its arrays, for rows in one batch and one by one."""
    names = list(run.extractors)
    together = replace(run, batch_tokens=1 << 30).compute(messages, ids, names)
    alone = replace(run, batch_tokens=1).compute(messages, ids, names)
    found = dict[str, float]()
    for name in names:
        found[name] = 0.0
        for key, value in alone[name].items():
            expected, given = (_dense(one) for one in (value, together[name][key]))
            norm = np.linalg.norm(expected, axis=1)
            difference = np.linalg.norm(given - expected, axis=1) / np.where(norm > 0, norm, 1)
            found[name] = max(found[name], float(np.nan_to_num(difference).max(initial=0)))
    return found


def _dense(value: Any) -> np.ndarray:
    value = value.scipy().toarray() if hasattr(value, "scipy") else value
    return np.asarray(value, np.float64).reshape(len(value), -1)


def warn_of_dependence(run: Pass, data: Dataset) -> dict[str, float]:
    """Measure on the first rows of `data` and name the features whose rows change by more than `TOLERANCE`."""
    some: dict[str, Any] = data[:ROWS]
    found = batch_dependence(run, some["messages"], some["id"])
    for name, share in found.items():
        if share > TOLERANCE:
            log.warning("%s: rows change by up to %.1f %% with the rows beside them in a batch (%s attention on %s); for rows "
                        "that do not, give dtype: float32 or batch_tokens: 1", name, 100 * share,
                        str(run.backbone.dtype).removeprefix("torch."), run.backbone.device)  # fmt: skip
    return found
