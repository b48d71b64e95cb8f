"""What selecting costs: forward passes of the model over the pool, counted from what a method reads.

One forward over a row's whole text is the unit; forward and backward, or a forward-mode derivative, count three. The
text of the responses alone counts by its share of the tokens, target rows passed behind every row by theirs. Clustering and
ranking are in the seconds only.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from llmselect.stages import TOKENS, Run

DERIVATIVE = 3.0
FORWARD_ONLY = {"trajectory", "color", "nuggets"}  # a pass of their own, without derivatives


def forwards(run: Run, feature: str) -> float:
    """Forward-equivalents of one feature of the whole pool, without a warm-up or an SAE's training."""
    warmup = run.recipe.warmup
    made: Any = run.recipe.extractor(feature)
    share = _total(run, "supervised") / max(1.0, _total(run, "total"))
    once = sum({"row": 1.0, "response": share}.get(view, 1.0) for view in made.views())
    if made.name in ("tokens", "classifier"):  # a classifier is another model: one forward of its own
        return float(made.name == "classifier")
    if getattr(made, "checkpoints", None) and warmup and getattr(made, "use", "all") == "all":
        once *= max(1, warmup.train.checkpoints) + (made.name == "trajectory" and made.base)
    if made.name == "color":  # with and without the target
        once *= 2
    if made.name == "nuggets":  # the row once, and behind it every target row
        once += _anchors(run, made.anchors) / max(1.0, _total(run, "total") / len(run.pool))
    if made.name == "curvature":  # the gradient, and two for each direction
        once *= 1 + 2 * (made.draws if made.direction == "random" else 1)
    return once * (DERIVATIVE if made.alone and made.name not in FORWARD_ONLY else 1.0)


def warmup_forwards(run: Run) -> float:
    """Forward-equivalents of the recipe's warm-up: its supervised tokens, as a share of the pool's."""
    import json

    told = json.loads((run.folder / "warmup" / "train.json").read_text())["result"]
    return DERIVATIVE * told["tokens"] / max(1.0, _total(run, "supervised"))


def sae_forwards(run: Run) -> float:
    """Forward-equivalents of reading the tokens that the recipe's SAE is trained on."""
    return 0.0 if run.recipe.sae is None else run.recipe.sae.tokens / max(1.0, _total(run, "total"))


def _anchors(run: Run, most: int | None) -> float:
    """Tokens of the target rows that stand behind a row: those of `most` rows of each group, of mean length."""
    tokens, group = np.asarray(run.store[f"{TOKENS}@target.total"]), np.asarray(run.target["group"])
    return sum(tokens[group == one].mean() * min(most or len(tokens), int((group == one).sum())) for one in set(group))


def _total(run: Run, kind: str) -> float:
    return float(np.asarray(run.store[f"{TOKENS}.{kind}"]).sum())
