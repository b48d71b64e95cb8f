"""What selecting costs: forward passes of the model over the pool, counted from what a method reads.

One forward over a row's whole text is the unit; forward and backward, or a forward-mode derivative, count three. The
text of the responses alone counts by its share of the tokens, target rows passed behind every row by theirs. Clustering and
ranking are in the seconds only.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from llmselect.color import with_adapters
from llmselect.extractors.color import Color
from llmselect.stages import TOKENS, Run

DERIVATIVE = 3.0
FORWARD_ONLY = {"trajectory", "color", "nuggets"}  # a pass of their own, without derivatives


def forwards(run: Run, feature: str) -> float:
    """Forward-equivalents of one feature of the whole pool, without those of `TRAININGS`."""
    warmup = run.recipe.warmup
    made: Any = run.recipe.extractor(feature)
    share = _total(run, "supervised") / max(1.0, _total(run, "total"))
    once = sum({"row": 1.0, "response": share}.get(view, 1.0) for view in made.views())
    if made.name in ("tokens", "classifier"):  # a classifier is another model: one forward of its own
        return float(made.name == "classifier")
    if getattr(made, "checkpoints", None) and warmup and getattr(made, "use", "all") == "all":
        once *= max(1, warmup.train.checkpoints) + (made.name == "trajectory" and made.base)
    if made.name == "color":  # with and without the target, for each task
        once *= len(made.adapters())
    if made.name == "nuggets":  # the row once, and behind it every target row
        once += _anchors(run, made.anchors) / max(1.0, _total(run, "total") / len(run.pool))
    if made.name == "curvature":  # the gradient, and two for each direction
        once *= 1 + 2 * (made.draws if made.direction == "random" else 1)
    return once * (DERIVATIVE if made.alone and made.name not in FORWARD_ONLY else 1.0)


def warmup_forwards(run: Run) -> float:
    """Forward-equivalents of the recipe's warm-up: its supervised tokens, as a share of the pool's."""
    return _fine_tuning(run, [run.folder / "warmup"])


def sae_forwards(run: Run) -> float:
    """Forward-equivalents of reading the tokens that the recipe's SAE is trained on."""
    return 0.0 if run.recipe.sae is None else run.recipe.sae.tokens / max(1.0, _total(run, "total"))


def color_forwards(run: Run) -> float:
    """Forward-equivalents of training the adapters of the recipe's `color:` section, of all tasks."""
    return _fine_tuning(run, with_adapters(Color(), run.recipe).adapters())


TRAININGS = {"warmup": warmup_forwards, "sae": sae_forwards, "color": color_forwards}


def per_task(run: Run, name: str) -> bool:
    """Whether the cost of a feature or training is the sum over tasks of what each would cost alone."""
    return name == "color:" or (name[-1] != ":" and isinstance(made := run.recipe.extractor(name), Color) and made.by_group)


def _fine_tuning(run: Run, adapters: Iterable[Path | None]) -> float:
    told = [json.loads((one / "train.json").read_text())["result"] for one in adapters if one is not None]
    return DERIVATIVE * sum(one["tokens"] for one in told) / max(1.0, _total(run, "supervised"))


def _anchors(run: Run, most: int | None) -> float:
    """Tokens of the target rows that stand behind a row: those of `most` rows of each group, of mean length."""
    groups: list[str] = [*run.target["group"]]
    tokens, group = np.asarray(run.store[f"{TOKENS}@target.total"]), np.asarray(groups)
    return sum(tokens[group == one].mean() * min(most or len(tokens), int((group == one).sum())) for one in set(groups))


def _total(run: Run, kind: str) -> float:
    return float(np.asarray(run.store[f"{TOKENS}.{kind}"]).sum())
